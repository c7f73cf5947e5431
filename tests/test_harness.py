"""Our model of lm-eval, and its own `hf` backend on the same files: the same answers."""

import pytest
import torch
from bench_files import data_root
from llamapro import Llama, LlamaConfig, expand
from llamapro.storage import write_json

pytest.importorskip("lm_eval")
from llamapro.eval import scoring, tasks
from llamapro.eval.evaluate import ask
from llamapro.eval.harness import Harness


@pytest.fixture
def path(tokenizer, tmp_path):
    """A random model that reads bytes, and is not sure of anything."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=300,
        max_position_embeddings=4096,
        eos_token_id=0,
        initializer_range=0.3,
        **sizes,
        **heads,
    )
    directory = Llama(config).save_pretrained(tmp_path / "talker")
    (tokenizer / "tokenizer.json").rename(directory / "tokenizer.json")
    write_json(directory / "tokenizer_config.json", {"eos_token": "<eos>"})
    return directory


@pytest.fixture
def theirs(path):
    """lm-eval's backend for transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(path), dtype="float32", device="cpu", batch_size=4)


def answers(model, name, root, limit):
    """What a model says to every request of a benchmark, in lm-eval's order."""
    found = ask(model, name, root, limit, samples=True)["samples"]
    return [said for task in sorted(found) for doc in found[task] for said in doc["resps"]]


def same(ours, theirs):
    """Texts and greedy flags are equal, log-likelihoods to 1e-4."""
    assert len(ours) == len(theirs) > 0
    for (our,), (their,) in zip(ours, theirs, strict=True):
        if isinstance(our, str):
            assert our == their
        else:
            assert our[0] == pytest.approx(their[0], abs=1e-4, rel=1e-6)
            assert our[1] == their[1]


@pytest.mark.parametrize("name", tasks.BENCHMARKS)
def test_answers_are_those_of_lm_evals_own_backend(path, theirs, tmp_path, name, monkeypatch):
    """Of a few questions at the paper's shots, with shared prefixes and passes of few tokens."""
    monkeypatch.setattr(scoring, "TOKENS_AT_A_TIME", 700)
    root, model = data_root(tmp_path / "bench"), Harness(Llama.from_pretrained(path), path, rows=3)
    found = [answers(lm, name, root, 6) for lm in (model, theirs)]
    same(*found)
    kinds = {said[1] for (said,) in found[0] if not isinstance(said, str)}
    assert name == "gsm8k" or False in kinds


def test_whole_texts_have_the_log_likelihoods_of_lm_evals_own_backend(path, theirs):
    """Also of texts that are longer than the context, by windows."""
    from lm_eval.api.instance import Instance

    model = Llama.from_pretrained(path)
    model.config.max_position_embeddings = theirs._max_length = 48
    texts = ["the cat saw it far. " * 9, "red", "a dog ran by the old one, and was not " * 3]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours = Harness(model, path).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs.loglikelihood_rolling(requests), abs=1e-3)


def test_an_expanded_model_says_what_its_base_says_bit_for_bit(path, tmp_path):
    root = data_root(tmp_path / "bench")
    base, expanded = Llama.from_pretrained(path), Llama.from_pretrained(path)
    expand(expanded, new_blocks=1)
    for name in ("hellaswag", "gsm8k"):
        one, other = (answers(Harness(m, path), name, root, 4) for m in (base, expanded))
        assert one == other


def test_a_limit_below_the_members_of_nested_groups_leaves_the_others_out(
    path, tmp_path, monkeypatch
):
    """lm-eval's own MMLU is a group of groups."""
    from lm_eval.api.group import AggMetricConfig, Group

    subjects = tasks.load("mmlu", data_root(tmp_path / "bench")).get_all_tasks()
    outer = Group("outer", aggregate_metric_list=[AggMetricConfig("acc")])
    for subject in subjects:
        outer.add(inner := Group(f"of {subject.task_name}"))
        inner.add(subject)
    monkeypatch.setattr(tasks, "load", lambda name, root: outer)
    found = ask(Harness(Llama.from_pretrained(path), path), "outer", None, 2)
    asked = {name: said["effective"] for name, said in found["n-samples"].items()}
    assert asked == {subject.task_name: 1 for subject in subjects[:2]}
    assert found["results"]["outer"]["sample_len"] == 2


def test_a_tag_stands_for_its_tasks_each_at_its_own_shots(monkeypatch):
    manager = tasks._manager
    arc = tasks.BENCHMARKS["arc_challenge"]
    monkeypatch.setattr(tasks, "_manager", lambda benchmark: manager(arc))
    assert tasks.names_of("gsm8k,ai2_arc,arc_easy") == ["gsm8k", "arc_challenge", "arc_easy"]


@pytest.mark.parametrize("request_", [([], [5]), ([5], [])], ids=["context", "continuation"])
def test_what_is_empty_has_no_score(path, request_):
    model = Llama.from_pretrained(path)
    with pytest.raises(ValueError, match=r"a token or more .* expected, got [01] and [01]"):
        scoring.score(model, [([5, 6], [7]), request_])


def test_shared_prefixes_are_computed_once(path, monkeypatch):
    model, passed = Llama.from_pretrained(path), []
    hidden = Llama.hidden

    def counted(self, tokens, *args, **options):
        passed.append(tokens.numel())
        return hidden(self, tokens, *args, **options)

    monkeypatch.setattr(Llama, "hidden", counted)
    shots = [*range(1, 200)]
    requests = [([*shots, i], [7, i, 8]) for i in range(1, 9)]
    scoring.score(model, requests)
    assert sum(passed) == len(shots) + 8 * 3  # what is only predicted is not computed


@pytest.mark.parametrize("shared", [0, 1, 70, 200])
def test_scores_are_those_of_each_alone(path, shared):
    """Targets before, across and behind the end of a prefix; contexts that are cut; twins."""
    model = Llama.from_pretrained(path).double()
    model.config.max_position_embeddings = 256
    torch.manual_seed(1)
    begun = torch.randint(300, (shared,)).tolist()
    requests = []
    for size in (1, 2, 5, 90, 240):
        context = (begun + torch.randint(300, (size,)).tolist())[-250:]
        requests += [(context, torch.randint(300, (n,)).tolist()) for n in (1, 1, 4, 60)]
    requests.append(requests[0])
    for (context, asked), said in zip(requests, scoring.score(model, requests), strict=True):
        ids = torch.tensor((context + asked)[-257:])
        with torch.no_grad():
            likely = model(ids[None, :-1])[0].log_softmax(-1)[-len(asked) :]
        targets = ids[1:][-len(asked) :]
        expected = likely.gather(1, targets[:, None]).sum().item()
        assert said.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert said.greedy == bool((likely.argmax(-1) == targets).all())
