"""How `benchmarks.gpu` checks and times one case, on a GPU or, for tests, on a CPU."""

import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

ROTATED_BYTES = 2**28  # of input sets that take turns: several times the largest L2
MOST_SETS = 8
ROUNDS = (5, 40)  # fewest and most; a row of short kernels gets all of them
PEER_FACTOR = 10  # a peer may be less exact than the formula, not compute something else


@dataclass(frozen=True)
class Peer:
    run: Callable
    group: int = 1  # it gets k and v with each head repeated so often, outside the timing


@dataclass(frozen=True)
class Case:
    """An op at one shape. Its functions take the tensors of `make` by position.

    The work is counted by hand as the least there is: each input read once and each output
    written once, or two FLOPs for each product that the result needs. A masked score or one that
    is computed a second time counts for nothing.
    """

    op: str  # a public function of llamapro_kernels
    shape: str
    make: Callable[[str, torch.dtype], dict[str, torch.Tensor]]  # device, dtype -> inputs
    ours: Callable
    formula: Callable  # plain PyTorch; in fp64 it is the truth
    wanted: tuple[str, ...]  # the inputs that want a gradient, in the peers too
    unit: str  # of the work: "flops" or "bytes"
    forward: float
    backward: float
    terms: int  # of the longest sum
    peers: dict[str, Peer] = field(default_factory=dict)
    passes: tuple[str, ...] = ("forward", "backward")
    most_seconds: float = 15  # that all of it may take, so as to end in time

    def work(self, which: str) -> float:
        both = self.forward + self.backward
        return {"forward": self.forward, "backward": self.backward, "both": both}[which]


class Cuda:
    """All that is asked of a GPU beyond tensors."""

    name = "cuda"

    def seconds(self, calls, lead: float) -> float:
        """Mean time of the calls, by events around all of them.

        A launch takes the host longer than a short kernel takes the GPU. So the GPU first spins
        for `lead` seconds, in which the host queues the calls: they then run back to back. All
        outputs live to the end, so that none is written to memory that is still in the cache.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(lead * 2e9))  # cycles, at no more than 2 GHz
        start.record()
        outputs = [call() for call in calls]
        end.record()
        end.synchronize()
        del outputs
        return start.elapsed_time(end) / 1e3 / len(calls)

    def warm_up(self, calls) -> float:
        """Compile and allocate; returns the lead: twice the time that queueing takes."""
        outputs = [call() for call in calls]
        torch.cuda.synchronize()
        del outputs
        start = time.perf_counter()
        outputs = [call() for call in calls]
        lead = 2 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        del outputs
        return min(lead, 0.02)  # a call that waits for the GPU itself needs no lead

    def peak_bytes(self, call) -> int:
        """Most memory above what was allocated before the call, its outputs included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        torch.cuda.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated() - before

    def release(self):
        torch.cuda.empty_cache()

    def label(self) -> str:
        return torch.cuda.get_device_name()


class Cpu:
    """The same for tests: it shows that everything runs, and measures nothing of interest."""

    name = "cpu"

    def seconds(self, calls, lead: float) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def warm_up(self, calls) -> float:
        calls[0]()
        return 0.0

    def peak_bytes(self, call) -> None:
        return None

    def release(self):
        pass

    def label(self) -> str:
        return "CPU"


def leaves(inputs, wanted, group=1):
    """The inputs without copies, as leaves of a graph; k and v expanded for a peer's group."""
    repeated = {
        name: x.repeat_interleave(group, 2) if group > 1 and name in ("k", "v") else x
        for name, x in inputs.items()
    }
    return {name: x.detach().requires_grad_(name in wanted) for name, x in repeated.items()}


def outputs_of(function, given):
    outputs = function(*given.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(outputs, given, wanted, upstream, **options):
    """Of the wanted inputs, through the outputs that depend on them."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], [given[name] for name in wanted], [g for _, g in pairs], **options
    )


def draw(case, device, dtype, function):
    """Random inputs, and incoming gradients for the outputs of the function: 1 for a loss."""
    inputs = case.make(device.name, dtype)
    with torch.no_grad():
        return inputs, random_like(outputs_of(function, inputs))


def random_like(outputs):
    """Contiguous, as a model's products give them, whatever order the formula has."""
    like = {"memory_format": torch.contiguous_format}
    return [torch.randn_like(o, **like) if o.dim() else torch.ones_like(o) for o in outputs]


def evaluate(function, inputs, upstream, wanted, group=1) -> dict[str, torch.Tensor]:
    """All results by name: outputs, and gradients with a repeated head's copies summed up."""
    given = leaves(inputs, wanted, group)
    outputs = outputs_of(function, given)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if wanted:
        grads = gradients(outputs, given, wanted, upstream)
        for name, grad in zip(wanted, grads, strict=True):
            repeated = grad.shape != inputs[name].shape
            results[f"d{name}"] = grad.unflatten(2, (-1, group)).sum(3) if repeated else grad
    return results


def in_fp64(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


class Check:
    """The three-way rule for one case on one set of inputs.

    Our largest error is at most twice that of the formula in the same dtype, plus one rounding of
    the largest true value to that dtype, plus a random walk of fp32 roundings over the longest
    sum: two right programs that add in different orders differ by that much.
    """

    def __init__(self, case, inputs, upstream, dtype):
        self.case, self.inputs, self.upstream, self.dtype = case, inputs, upstream, dtype
        exact = dict(zip(inputs, in_fp64(inputs.values()), strict=True))
        self.truth = evaluate(case.formula, exact, in_fp64(upstream), case.wanted)
        plain = evaluate(case.formula, inputs, upstream, case.wanted)
        self.plain = {name: self._error(name, x) for name, x in plain.items()}

    def _error(self, name, value) -> float:
        truth = self.truth[name]
        if value.shape != truth.shape:
            return math.inf
        return (value - truth).abs_().max().item()

    def bound(self, name, factor) -> float:
        summed = math.sqrt(self.case.terms) * torch.finfo(torch.float32).eps / 2
        rounding = torch.finfo(self.dtype).eps / 2 + summed
        return factor * self.plain[name] + rounding * self.truth[name].abs().max().item()

    def of(self, results: dict[str, torch.Tensor], factor) -> dict[str, dict]:
        """Error, bound and the formula's own error of each result; see `wrong`."""
        return {
            name: {
                "error": self._error(name, value),
                "bound": self.bound(name, factor),
                "plain": self.plain[name],
            }
            for name, value in results.items()
        }

    def of_ours(self):
        return self._evaluated(Peer(self.case.ours), 2)

    def of_peer(self, peer):
        return self._evaluated(peer, PEER_FACTOR)

    def _evaluated(self, peer, factor):
        wanted = self.case.wanted
        return self.of(evaluate(peer.run, self.inputs, self.upstream, wanted, peer.group), factor)


def check_ends(case, device, dtype):
    """The same for a case too large for the formula: its first and last rows, which are its own.

    Only for ops that treat each row of the wanted inputs by itself.
    """
    inputs, upstream = draw(case, device, dtype, case.ours)
    results = evaluate(case.ours, inputs, upstream, case.wanted)
    ends = [0, 1, -2, -1]
    inputs = {name: x[ends] if name in case.wanted else x for name, x in inputs.items()}
    check = Check(case, inputs, [g[ends] for g in upstream], dtype)
    return check.of({name: x[ends] for name, x in results.items()}, 2)


def wrong(errors: dict[str, dict]) -> str:
    """What broke its bound, in words; empty when nothing did. NaN breaks every bound."""
    return "; ".join(
        f"{name}: error {e['error']:.2e}, bound {e['bound']:.2e}"
        for name, e in errors.items()
        if not (e["error"] <= e["bound"] < math.inf)
    )


def attempt(function, *args):
    """(result, "") or (None, what went wrong); the traceback would keep tensors alive."""
    try:
        return function(*args), ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:300]}"


def installed(*packages) -> dict[str, str]:
    """The versions that a figure must come with."""
    return {p: attempt(importlib.metadata.version, p)[0] or "not installed" for p in packages}


def more_sets(case, device, dtype, inputs, upstream):
    """Input sets that together are past the cache, the given one among them."""
    size = sum(x.nbytes for x in inputs.values())
    count = min(MOST_SETS, math.ceil(ROTATED_BYTES / size)) if device.name == "cuda" else 2
    more = [(case.make(device.name, dtype), random_like(upstream)) for _ in range(count - 1)]
    return [(inputs, upstream), *more]


def calls_of(function, sets, wanted, which, group=1) -> list[Callable]:
    """One call for each input set. Backward alone goes over a graph that is kept."""

    def call(inputs, upstream):
        given = leaves(inputs, wanted, group)
        if which == "forward":
            return lambda: outputs_of(function, given)
        if which == "both":
            return lambda: gradients(outputs_of(function, given), given, wanted, upstream)
        kept = outputs_of(function, given)
        return lambda: gradients(kept, given, wanted, upstream, retain_graph=True)

    return [call(*one) for one in sets]


def warmed(device, calls):
    """The calls after they have run, and their lead: what cannot run fails here."""
    return calls, device.warm_up(calls)


def interleaved(device, contestants: dict[str, tuple], seconds) -> dict[str, list[float]]:
    """Times of all that `warmed` returned, in turns and in alternating order."""
    samples = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    for turn in range(ROUNDS[1]):
        for name in contestants if turn % 2 else reversed(contestants):
            samples[name].append(device.seconds(*contestants[name]))
        if turn + 1 >= ROUNDS[0] and time.perf_counter() > end:
            break
    return samples


def summary(samples: list[float]) -> dict:
    """Median, and the 10th and 90th percentile, in ms."""
    ms = [s * 1e3 for s in samples]
    tenths = statistics.quantiles(ms, n=10, method="inclusive")
    return {"ms": statistics.median(ms), "ms_10_90": [tenths[0], tenths[-1]], "rounds": len(ms)}


def time_pass(case, which, device, sets, peers, seconds) -> dict:
    """Times and peak memory of ours and of every peer that runs; an error is a peer's own."""
    contestants, errors = {}, {}
    for name, peer in {"ours": Peer(case.ours), **peers}.items():
        runnable, error = attempt(
            lambda p=peer: warmed(device, calls_of(p.run, sets, case.wanted, which, p.group))
        )
        if error and name == "ours":
            raise RuntimeError(error)
        if error:
            errors[name] = {"error": error}
        else:
            contestants[name] = runnable
    results = {name: summary(s) for name, s in interleaved(device, contestants, seconds).items()}
    for name, result in results.items():
        calls, _ = contestants[name]
        result["peak_bytes"] = device.peak_bytes(calls[0])
    ours = results.pop("ours")
    for result in results.values():
        result["ratio"] = result["ms"] / ours["ms"]
    return {**ours, "peers": {**results, **errors}}


def roofs(device, scale) -> dict:
    """What one large copy (read plus written bytes) and one large bf16 product reach here."""
    source = torch.randn(scale.copy_bytes // 4, device=device.name)
    target = torch.empty_like(source)
    shape = (scale.matmul, scale.matmul)
    a, b = (torch.randn(*shape, device=device.name, dtype=torch.bfloat16) for _ in "ab")
    calls = {"bytes": [lambda: target.copy_(source)], "flops": [lambda: a @ b]}
    work = {"bytes": 2 * source.nbytes, "flops": 2 * scale.matmul**3}
    contestants = {kind: warmed(device, kind_calls) for kind, kind_calls in calls.items()}
    samples = interleaved(device, contestants, scale.seconds)
    return {kind: work[kind] / statistics.median(samples[kind]) for kind in work}
