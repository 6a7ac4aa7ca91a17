"""What other programs call our flags: a typing habit is answered with the flag that is meant. Read next: `parse.py`."""

from __future__ import annotations

import types
from collections.abc import Mapping

_NAMES = {
    "--steps": "max-steps num-steps n-steps total-steps train-steps iterations iters max-iters num-iterations",
    "--seed": "random-seed rng-seed",
    "--devices": "num-devices n-devices device-count",
    "--init-from": "checkpoint-path pretrained load-from init-checkpoint",
    "--mesh.tensor": "tp tensor-parallel tensor-parallelism tensor-parallel-size model-parallel",
    "--mesh.data": "dp data-parallel data-parallelism",
    "--mesh.stage": "pp pipeline pipeline-parallel",
    "--mesh.expert": "ep expert-parallel",
    "--mesh.context": "cp sp context-parallel sequence-parallel",
    "--model.layers": "num-layers n-layers n-layer depth num-hidden-layers blocks",
    "--model.width": "hidden-size hidden-dim d-model dim dmodel n-embd embed-dim embedding-dim model-dim",
    "--model.heads": "num-heads n-heads n-head num-attention-heads attention-heads",
    "--model.kv-heads": "num-kv-heads n-kv-heads num-key-value-heads",
    "--model.head-dim": "head-size d-head dim-head",
    "--model.mlp": "ffn ff d-ff mlp-dim ffn-dim ffn-hidden-size intermediate-size feed-forward",
    "--model.vocabulary": "vocab vocab-size n-vocab num-embeddings",
    "--model.tied": "tie-embeddings tie-word-embeddings weight-tying",
    "--data.path": "dataset data-path data-dir train-data corpus train-file",
    "--data.sequence": "seq seq-len seq-length sequence-length max-seq-len max-length block-size context-length "
    "context-size context-len n-ctx",
    "--data.batch": "bs batch-size batchsize global-batch-size train-batch-size",
    "--optim.name": "optimizer optim opt",
    "--optim.learning-rate": "lr max-lr peak-lr learningrate",
    "--optim.schedule": "scheduler lr-schedule lr-scheduler lr-scheduler-type",
    "--optim.warmup": "warmup-steps warm-up num-warmup-steps lr-warmup",
    "--optim.weight-decay": "wd decay-weight weightdecay",
    "--optim.b1": "beta1 adam-beta1 beta-1",
    "--optim.b2": "beta2 adam-beta2 beta-2",
    "--optim.epsilon": "eps adam-eps adam-epsilon",
    "--optim.clip": "grad-clip clip-grad gradient-clip clip-norm max-grad-norm gradient-clipping grad-norm-clip",
    "--optim.ema": "ema-decay average",
    "--train.microbatches": "grad-accum gradient-accumulation gradient-accumulation-steps accumulate accum-steps "
    "accumulation-steps micro-batches",
    "--precision.compute": "dtype precision mixed-precision compute-dtype",
    "--remat.policy": "remat checkpointing gradient-checkpointing activation-checkpointing recompute",
    "--evaluate.every": "eval-every eval-steps eval-interval eval-frequency val-interval",
    "--checkpoint.every": "save-every save-steps save-interval checkpoint-interval checkpoint-every save-freq",
    "--checkpoint.keep": "save-total-limit max-to-keep keep-last",
    "--run.dir": "out out-dir output output-dir run-dir workdir log-dir save-dir",
    "--run.track": "tracker report-to logger wandb tensorboard",
    "--max-tokens": "max-new-tokens num-tokens max-length n-tokens length",
    "--samples": "num-samples n-samples num-return-sequences",
    "--temperature": "temp",
}


def _reversed() -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for flag, names in _NAMES.items():
        for name in names.split():
            found[name] = (*found.get(name, ()), flag)
    return types.MappingProxyType(found)


SYNONYMS = _reversed()
"""Another program's name, without its group -> our flags of that meaning. A command has one of them at most."""
