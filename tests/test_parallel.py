"""Training on several ranks: the losses, the weights and the files of one."""

from dataclasses import replace

import pytest
import torch
from llamapro.train.loop import train
from run_files import records
from run_ranks import train_together
from safetensors.torch import load_file


def losses(config):
    return torch.tensor([*records(config).values()], dtype=torch.float64)


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_train_as_one_does(config, tmp_path, shard, count):
    config = replace(config, dtype="float32", batch_size=4, shard=shard)
    train(config)
    together = replace(config, out=str(tmp_path / "together"))
    print(train_together(together, count))
    print(losses(config) - losses(together))
    torch.testing.assert_close(losses(together), losses(config), rtol=1e-5, atol=0)
    a, b = (load_file(f"{c.out}/final/model.safetensors") for c in (config, together))
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-4, atol=1e-6)
