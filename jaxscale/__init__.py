"""jaxscale: train real models in JAX on any mesh. Importing it makes no backend, no thread and no array.

Reading order: config -> axes -> mesh -> task -> models/transformer -> data -> train/step -> train/loop -> checkpoint
-> supervisor.
"""

__version__ = "0.1.0"
