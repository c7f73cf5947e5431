import os
import subprocess
import sys
import textwrap

import pytest
import torch

import llamapro_kernels as lk
from llamapro_kernels import cpu, library

OPS = {
    "add_rms_norm",
    "flash_attention",
    "linear_cross_entropy",
    "linear_cross_entropy_frozen",
    "linear_kl_divergence",
    "linear_swiglu",
    "quantize_rows",
    "rms_norm",
    "rope",
    "swiglu",
}


def test_every_op_names_its_backend():
    assert lk.backends().keys() == OPS
    assert set(lk.backends().values()) <= set(library.BACKENDS)


def test_use_backend_forces_and_restores():
    before = lk.backends()
    with lk.use_backend("reference"):
        assert set(lk.backends().values()) == {"reference"}
    assert lk.backends() == before


def test_a_backend_is_released_after_an_error_and_in_any_order():
    with pytest.raises(KeyError), lk.use_backend("reference"):
        raise KeyError
    first, second = lk.use_backend("cpp"), lk.use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(lk.backends().values()) == {"reference"}
    second.__exit__(None, None, None)
    assert not library._forced


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'"), lk.use_backend("cuda"):
        pass


@pytest.fixture
def extra_backend(monkeypatch):
    """rms_norm with a second implementation, as an op file would register it."""
    op = library._ops["rms_norm"]
    monkeypatch.setattr(op, "implementations", dict(op.implementations))
    calls = []

    def forward(x, weight, eps):
        calls.append("forward")
        return op.implementations["reference"]["forward"](x, weight, eps)

    op.register("cpp", forward=forward, backward=op.implementations["reference"]["backward"])
    monkeypatch.setattr(cpu, "WHY_NO_BUILD", None)
    return calls


def test_a_registered_backend_serves_without_a_change_elsewhere(extra_backend):
    assert lk.backends("cpu")["rms_norm"] == "cpp"
    lk.rms_norm(torch.ones(2, 3), torch.ones(3))
    assert extra_backend == ["forward"]
    with lk.use_backend("reference"):
        lk.rms_norm(torch.ones(2, 3), torch.ones(3))
    assert extra_backend == ["forward"]


def test_fp64_goes_to_the_reference(extra_backend):
    lk.rms_norm(torch.ones(2, 3).double(), torch.ones(3).double())
    assert extra_backend == []


def test_a_missing_backend_is_an_error_not_a_fallback(monkeypatch):
    op = library._ops["swiglu"]
    monkeypatch.setattr(op, "implementations", {"reference": op.implementations["reference"]})
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="swiglu has no 'triton'"):
        lk.swiglu(torch.ones(2, 4))
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "WHY_NO_BUILD", "cpu_avx2 was not built")
    with (
        lk.use_backend("cpp"),
        pytest.raises(RuntimeError, match="here: cpu_avx2 was not built"),
    ):
        lk.swiglu(torch.ones(2, 4))


def test_a_machine_without_compiled_ops_is_told_so_once():
    code = """
    import warnings, torch
    import llamapro_kernels as lk
    assert set(lk.backends("cpu").values()) == {"reference"}, lk.backends("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            lk.swiglu(torch.ones(2, 4))
            lk.swiglu(torch.ones(2, 4).double())
    print(*(str(w.message) for w in caught), sep="\\n")
    """
    nothing_built = "import pathlib; pathlib.Path.exists = lambda path: False\n"
    said = python(nothing_built + textwrap.dedent(code), LLAMAPRO_NO_EXTENSION="")
    assert said.stdout.count("more slowly") == 1 and "was not built" in said.stdout
    assert python(code, LLAMAPRO_NO_EXTENSION="1").stdout.strip() == ""  # who asked for it, knows


def python(code, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_import_adds_little():
    """Median of three, in one process each, of the CPU seconds that our import adds to torch's;
    Triton, half a second of its own, comes where a GPU is."""
    code = """
    import sys, time
    import torch
    start = time.process_time()
    import llamapro_kernels
    print(time.process_time() - start)
    import llamapro
    without = {"torch._dynamo", "transformers", "tyro"}
    if not torch.cuda.is_available():
        without.add("triton")
    assert not without & sys.modules.keys(), without & sys.modules.keys()
    """
    seconds = sorted(float(python(code, LLAMAPRO_TRITON="").stdout) for _ in range(3))
    assert seconds[1] < 0.3


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "llamapro_kernels"])
def test_flops_are_counted_whoever_is_imported_first(first):
    code = f"""
    import {first}
    import torch, llamapro_kernels as lk
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        lk.linear_swiglu(torch.ones(2, 3), torch.ones(8, 3))
    print(counter.get_total_flops())
    """
    assert python(code, LLAMAPRO_TRITON="").stdout.split() == ["96"]


def test_the_shortcut_past_the_dispatcher_is_taken_only_where_nobody_listens(monkeypatch):
    """Autograd, modes, the profiler and tensors without memory are served by the registered op."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    x, weight = torch.randn(3, 8), torch.ones(8)
    routed = []
    check = library._for_dispatcher

    def noted(args):
        routed.append(check(args))
        return routed[-1]

    monkeypatch.setattr(library, "_for_dispatcher", noted)

    class Listens(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += function.name() == "llamapro::rms_norm"
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        plain = library.ops.rms_norm(x, weight, 1e-5)
        assert routed == [False]
        for way, both in zip(plain, torch.ops.llamapro.rms_norm(x, weight, 1e-5), strict=True):
            assert torch.equal(way, both)
        with Listens() as mode:
            library.ops.rms_norm(x, weight, 1e-5)
        assert mode.seen == 1
        with torch.profiler.profile() as profiler:
            library.ops.rms_norm(x, weight, 1e-5)
        assert any(event.name == "llamapro::rms_norm" for event in profiler.events())
        assert library.ops.rms_norm(x.to("meta"), weight.to("meta"), 1e-5)[0].is_meta
        fake = FakeTensorMode()
        with fake:
            found = library.ops.rms_norm(torch.empty(3, 8), torch.ones(8), 1e-5)[0]
        assert type(found) is FakeTensor
        found = library.ops.rms_norm(fake.from_tensor(x), fake.from_tensor(weight), 1e-5)[0]
        assert type(found) is FakeTensor
    assert library.ops.rms_norm(x.requires_grad_(), weight, 1e-5)[0].requires_grad
    assert routed == [False] + [True] * 6
