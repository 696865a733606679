"""What the pretended device itself must do, checked in a process of its own: `python pretended_checks.py` runs every `check_…` of this file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pretended_cuda import ALLOCATOR, CUDA, SYNCS, KernelMemory, Pretended, on_cpu
from pretended_torch import install


@contextmanager
def refused(kind: type[Exception], words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was refused; expected: {words}")


@contextmanager
def waits(times: int) -> Iterator[None]:
    """Within, the host waits for the device so many times."""
    before = SYNCS.total()
    yield
    assert SYNCS.total() - before == times, SYNCS


def check_tensors_of_two_devices_do_not_mix() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda:0")
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.mul_(here), lambda: torch.nn.functional.linear(there, here[None])):
        with refused(RuntimeError, "same device"):
            mixed()
    with refused(RuntimeError, "indices should be"):
        here[torch.zeros(1, dtype=torch.long, device=CUDA)]
    with refused(RuntimeError, "same device"):
        there[torch.tensor([0, 1])] = here[:2]
    with refused(RuntimeError, "same device"):
        torch.nn.Linear(3, 3).cuda()(here)
    assert (there + torch.tensor(1.0)).device == CUDA and there[torch.tensor([0, 1])].device == CUDA  # CPU scalars and indices are taken


def check_numbers_and_gradients_are_the_cpus() -> None:
    torch.manual_seed(0)
    model, rows = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)), torch.randn(5, 4)
    model(rows).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.to("cuda")(rows.cuda()).square().mean().backward()
    assert all(isinstance(parameter.grad, Pretended) for parameter in model.parameters())
    assert all(torch.allclose(parameter.grad.cpu(), wanted) for parameter, wanted in zip(model.parameters(), expected, strict=True))


def check_indices_of_every_kind_choose_the_same_rows() -> None:
    here, there = torch.arange(12.0).view(4, 3), torch.arange(12.0, device="cuda").view(4, 3)
    for index in ([0, 2], [True, False, True, True], np.array([1, 3]), (slice(1, 3), [0, 2]), torch.tensor([3, 0]), 2, ..., None):
        assert torch.equal(there[index].cpu(), here[index])
        here[index], there[index] = -1.0, -1.0
        assert torch.equal(there.cpu(), here)
        here, there = here + torch.arange(4.0)[:, None], there + torch.arange(4.0, device="cuda")[:, None]


def check_numpy_is_refused() -> None:
    with refused(TypeError, "can't convert cuda:0 device type tensor to numpy"):
        torch.ones(2, device="cuda").numpy()
    assert torch.ones(2, device="cuda").cpu().numpy().sum() == 2


def check_generators_belong_to_a_device() -> None:
    for generator, device in ((torch.Generator(), "cuda"), (torch.Generator("cuda"), "cpu")):
        with refused(RuntimeError, "device type for generator"):
            torch.randn(2, generator=generator, device=device)
    assert torch.randn(2, generator=torch.Generator("cuda"), device="cuda").device == CUDA


def check_waits_are_counted() -> None:
    there, mask = torch.arange(4.0, device="cuda"), torch.arange(4, device="cuda") > 1
    with waits(0):
        twice = there * 2 + there.sum()
        torch.where(mask, there, twice)
        torch.ones(3).to("cuda")
    for waiting in (lambda: there.sum().item(), lambda: bool(mask.any()), lambda: there[mask], lambda: there.cpu(), mask.nonzero, there.tolist,
                    lambda: torch.empty(4).copy_(there), lambda: there.masked_select(mask), torch.cuda.synchronize):  # fmt: skip
        with waits(1):
            waiting()


def check_bytes_are_those_of_live_storages() -> None:
    before = torch.cuda.memory_stats()["requested_bytes.all.current"], torch.cuda.memory_allocated()
    whole = torch.zeros(1000, device="cuda")
    views = [whole[:10], whole.view(10, 100), whole.detach()]
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] - before[0] == 4000 and torch.cuda.memory_allocated() - before[1] == 4096
    torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated()
    whole.mul(2).add(1)  # two more at once
    assert torch.cuda.max_memory_allocated() - peak == 2 * 4096
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == peak and torch.cuda.mem_get_info()[0] == ALLOCATOR.total - peak
    del whole
    assert torch.cuda.memory_allocated() - before[1] == 4096  # views hold it
    del views
    assert torch.cuda.memory_allocated() == before[1]


def check_the_packages_refuse_cpu_tensors_and_odd_strides() -> None:
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    weight, rows = torch.randn(16, 4), torch.randn(2, 12, 24)
    with refused(RuntimeError, "Expected x.is_cuda() to be true"):
        causal_conv1d_fn(rows.transpose(1, 2)[:, :16], weight)
    channel_last = rows.cuda().transpose(1, 2)
    assert causal_conv1d_fn(channel_last[:, :16], weight.cuda()).shape == (2, 16, 12)
    with refused(RuntimeError, "to be multiples of 8"):
        causal_conv1d_fn(torch.randn(2, 12, 20).cuda().transpose(1, 2)[:, :16], weight.cuda())
    with refused(ValueError, "cannot be accessed from Triton"):
        mamba_chunk_scan_combined(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2), -torch.ones(2), *[torch.ones(1, 4, 1, 8)] * 2, 4)


def check_the_packages_compute_what_transformers_does_without_them() -> None:
    """The convolution, the scan, their single steps and the fused mixer, through transformers' own layer, train and eval."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    from memory_budget.architecture import Architecture
    from minitron.families.nemotron_h import FAMILY
    from minitron.training.tiny_teacher import TINY_CONFIG

    torch.manual_seed(0)
    small = Architecture(model_type="nemotron_h", pattern="M*", hidden=16, vocab=32, ffn=16, num_attention_heads=2, num_key_value_heads=1,
                         attention_head_dim=8, mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=2, mamba_state_size=8, mamba_conv_kernel=4)  # fmt: skip
    model, ids = FAMILY.build(FAMILY.hf_config(TINY_CONFIG, small)).eval(), torch.randint(32, (2, 21))
    with torch.no_grad():  # as transformers begins, the state adds so little that its gradients are lost in rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.5))

    def outputs(ids: torch.Tensor) -> list[torch.Tensor]:
        model.eval().zero_grad()
        first = model(ids[:, :-1], use_cache=True)
        with torch.no_grad():
            second = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        logits = model.train()(ids, use_cache=False).logits
        logits.square().mean().backward()
        return [tensor.detach().cpu() for tensor in (first.logits, second.logits, logits, *(parameter.grad for parameter in model.parameters()))]

    names = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_split_conv1d_scan_combined", "mamba2_selective_state_update", "mamba2_chunk_scan")
    pretended = {name: getattr(modeling, name) for name in names}
    for name, function in pretended.items():
        setattr(modeling, name, function.__wrapped__)
    expected = outputs(ids)
    for name, function in pretended.items():
        setattr(modeling, name, function)
    model.cuda()
    for found, wanted in zip(outputs(ids.cuda()), expected, strict=True):
        assert (found - wanted).norm() <= 1e-4 * wanted.norm(), (found - wanted).norm() / wanted.norm()


def check_autocast_casts_products_down_and_powers_up_also_when_a_layer_is_computed_again() -> None:
    layer, rows, seen = torch.nn.Linear(4, 4, bias=False).cuda(), torch.ones(2, 4, device="cuda", requires_grad=True), []

    def called(rows):
        product = layer(rows)
        seen.append(product.dtype)
        return product.square()

    called(rows)
    with torch.autocast("cuda", torch.bfloat16):
        result = torch.utils.checkpoint.checkpoint(called, rows, use_reentrant=False)
    result.sum().backward()
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16] and result.dtype == layer.weight.grad.dtype == torch.float32


def check_what_a_kernel_takes_is_counted_while_it_runs_and_what_it_keeps_until_its_backward_pass_is_through() -> None:
    rows = torch.ones(1024, device="cuda", requires_grad=True)
    before = ALLOCATOR.allocated
    ALLOCATOR.reset_peak()
    result = on_cpu(lambda rows: rows * 2, rows, memory=KernelMemory(keeps=2**20, forward=2**24, backward=2**25))
    assert ALLOCATOR.peak - before == 4096 + 2**20 + 2**24 and ALLOCATOR.allocated - before == 4096 + 2**20
    ALLOCATOR.reset_peak()
    result.backward(torch.ones_like(result))
    assert 2**25 + 2**20 <= ALLOCATOR.peak - before < 2**25 + 2**20 + 2**15 and ALLOCATOR.allocated - before < 2**15


def main() -> None:
    torch.set_num_threads(1)
    install()
    checks: dict[str, Callable[[], None]] = {name: check for name, check in globals().items() if name.startswith("check_")}
    for name, check in checks.items():
        check()
        print(name.removeprefix("check_").replace("_", " "))


if __name__ == "__main__":
    sys.exit(main())
