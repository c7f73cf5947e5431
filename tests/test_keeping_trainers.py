"""The loss that keeps what the base knows, in Trainer and SFTTrainer: hand-written loops agree."""

import pytest
import torch
from apply_cases import assert_three_way
from datasets import Dataset
from llamapro.integrations import transformers as lpt
from test_keeping import KEPT, WEIGHT, pair, plain
from test_trainers import COMMON, LAYOUTS, rows
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

STEPS, ACCUMULATED = 6, 2
SETTINGS = {**COMMON, "max_steps": STEPS, "lr_scheduler_type": "constant"}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 60}


class KeepingTrainer(SFTTrainer):
    """One forward a step: SFTTrainer's own takes another for its metrics."""

    compute_loss = Trainer.compute_loss


def examples():
    """Every other row is a sample of the base."""
    return [
        {"input_ids": ids, "labels": [KEPT] * len(ids) if i % 2 else ids}
        for i, ids in enumerate(rows(40, ragged=True))
    ]


def collate(batch):
    ids, labels = ([torch.tensor(row[name]) for row in batch] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def run(trainer):
    """Losses and new blocks after training, and the batches that were trained on."""
    collator, batches = trainer.data_collator, []
    trainer.data_collator = lambda batch: batches.append(collator(batch)) or dict(batches[-1])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return state(losses, trainer.model), batches[: STEPS * ACCUMULATED]


def state(losses, model):
    new = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **new}


def by_hand(batches, dtype):
    base, model = pair(dtype=dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for i in range(0, len(batches), ACCUMULATED):
        step = [{n: v for n, v in b.items() if n != "seq_idx"} for b in batches[i:][:ACCUMULATED]]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        optimizer.zero_grad()
        step_losses = [plain(model, base, batch, count) for batch in step]
        sum(step_losses).backward()
        optimizer.step()
        losses.append(sum(step_losses).item())
    return state(losses, model)


def assert_by_hand(ours, batches):
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert (labels == KEPT).any() and (labels >= 0).any() and len(ours["losses"]) == STEPS
    peer, exact = (by_hand(batches, dtype) for dtype in (torch.float32, torch.float64))
    assert (peer["losses"] - exact["losses"]).abs().max() < 1e-5  # the same run
    assert_three_way(ours, peer, exact, torch.float32)


@pytest.mark.parametrize("apply", [False, True], ids=["stock", "applied"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, calls, apply, checkpointing):
    _, model = pair(apply=apply)
    options = TrainingArguments(tmp_path, gradient_checkpointing=checkpointing, **SETTINGS)
    loss = lpt.BaseKeepingLoss(model, WEIGHT)
    data, callbacks = examples(), [lpt.BlockExpansionCallback()]
    ours, batches = run(
        Trainer(model, options, collate, data, compute_loss_func=loss, callbacks=callbacks)
    )
    assert_by_hand(ours, batches)
    kept = sum((batch["labels"][:, 1:] == KEPT).any().item() for batch in batches)
    assert calls["decoder_block"] == apply * (4 * len(batches) + 3 * kept)


@pytest.mark.parametrize("kind", [SFTTrainer, KeepingTrainer])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_sft_trainer(tmp_path, layout, kind):
    words = models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1"
    )
    _, model = pair(apply=True)
    options = SFTConfig(str(tmp_path), **SETTINGS, **LAYOUTS[layout])
    trainer = kind(
        model,
        options,
        train_dataset=Dataset.from_list(examples()),
        processing_class=tokenizer,
        compute_loss_func=lpt.BaseKeepingLoss(model, WEIGHT),
    )
    assert_by_hand(*run(trainer))


def test_a_trainer_in_bf16_and_its_evaluation(tmp_path):
    """Before anything is learnt the base is kept to the bit, though autocast ends before a loss."""
    _, model = pair(moved=False)
    options = TrainingArguments(tmp_path, **{**SETTINGS, "bf16": True})
    data = [{**row, "labels": [KEPT] * len(row["labels"])} for row in examples()]
    loss = lpt.BaseKeepingLoss(model, WEIGHT)
    trainer = Trainer(model, options, collate, data, data[:3], compute_loss_func=loss)
    assert not run(trainer)[0]["losses"].any()
    assert trainer.evaluate()["eval_loss"] == 0


def test_kept_rows_forget_less(tmp_path):
    """Than when they do not count, while the other rows are learnt as well."""
    samples = rows(16)
    after = {}
    for label in (KEPT, -100):
        base, model = pair(moved=False)
        loss = lpt.BaseKeepingLoss(model)
        data = [{"input_ids": ids, "labels": [label] * len(ids)} for ids in samples]
        data += [{"input_ids": [7, 9] * 6, "labels": [7, 9] * 6}] * 16
        options = TrainingArguments(tmp_path, **{**SETTINGS, **ADAM})
        Trainer(model, options, collate, data, compute_loss_func=loss).train()
        tests = collate(data[:1]), collate(data[-1:])
        tests[0]["labels"].fill_(KEPT)
        after[label] = [plain(model.eval(), base, test).item() for test in tests]
    assert after[KEPT][0] < after[-100][0] / 10
    assert after[KEPT][1] < after[-100][1] * 1.1
