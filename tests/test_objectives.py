"""Token losses in slices: the same numbers as plain cross-entropy, without its copies."""

import pytest
import torch
import torch.nn.functional as F

from mtl import objectives


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_give_the_losses_and_gradients_of_plain_cross_entropy(monkeypatch, rows, dtype):
    monkeypatch.setattr(objectives, "SLICE", 7 * 11)  # 7 rows of 11 at once
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 11, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(11, (rows,), generator=generator)
    factor = torch.rand(rows, generator=generator)
    found = objectives.token_losses(logits, labels)
    (gradient,) = torch.autograd.grad((found * factor).sum(), logits)
    plain = F.cross_entropy(logits.float(), labels, reduction="none")
    (wanted,) = torch.autograd.grad((plain * factor).sum(), logits)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(found, plain) and torch.equal(gradient, wanted)


def test_nothing_of_the_logits_size_is_kept_for_the_backward_pass_but_the_logits(monkeypatch):
    monkeypatch.setattr(objectives, "SLICE", 16 * 1000)
    logits = torch.randn(256, 1000, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(256, dtype=torch.int64)

    def kept(function) -> int:
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(logits, labels)
        return sum(storages.values())

    size = logits.untyped_storage().nbytes()
    plain = kept(lambda x, y: F.cross_entropy(x.float(), y, reduction="none"))
    assert plain >= 2 * size  # the log-softmax, in fp32
    assert kept(objectives.token_losses) <= 1.02 * size  # the logits themselves, and labels
