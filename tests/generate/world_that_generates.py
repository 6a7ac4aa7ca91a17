"""One process of a world that generates the text of test_text.py: `... DISTRIBUTED`."""

import json
import sys

from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh, prepare_backend
from jaxscale.world import membership, parse_distributed


def main() -> None:
    from generate_samples import MODELS, config_of, make_params
    from test_text import DRAWN, PROMPTS, PrintableTokenizer

    config = config_of(MODELS["all"], devices=4, mesh=MeshConfig(fsdp=2, tensor=2))
    world = parse_distributed(sys.argv[1])
    prepare_backend(config, world)
    with membership(world):
        import jax

        from jaxscale.generate.text import generate_text

        with jax.set_mesh(make_mesh(config)):
            task = config.model.task(config)
            params = make_params(task, spread=5.0)
            found = generate_text(task, params, PrintableTokenizer(), PROMPTS, **DRAWN)
        print(json.dumps(found))


main()
