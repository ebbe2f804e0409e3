"""Fine-tune a language model on packed documents with `transformers.Trainer` and attention from `fa_ops`.

The documents are functions of Python's standard library: the prompt is the head of a function with its docstring, the
answer, which alone is learnt, its body. DataCollatorWithFlattening lays the documents of a batch one behind the other,
without padding; none sees another. The same model with eager and with sdpa learns the same documents in padded batches.
The closing table says what was gained; if the losses differ by more than rounding explains, the exit status is 1.
"""

import argparse
import ast
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from textdata import BOUNDARY, VOCAB_SIZE, stdlib_documents
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_accelerate_available

import fa_ops

OURS = "modelopt_triton"
ATTENTIONS = (OURS, "sdpa", "eager")
SEED = 0
NO_LABEL = -100
# Of hidden size, layers, and query heads of the random Llama; a key and value head serves two of them.
SIZES = {"cpu": (128, 2, 4), "cuda": (1024, 8, 16)}
# Relative to the loss: two orders of summation in float32 differ by a few roundings, which every step amplifies.
LARGEST_LOSS_DIFFERENCE = 256 * torch.finfo(torch.float32).eps

Example = dict[str, list[int]]
Tokenize = Callable[[str, str], tuple[list[int], list[int]]]


@dataclass
class History:
    """Of each step: its loss, its tokens without and with padding, and when it ended, in seconds."""

    losses: list[float] = field(default_factory=list)
    valid_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def tokens_per_second(self) -> float:
        """Padding not counted, and without the first step, which warms up."""
        return sum(self.valid_tokens[1:]) / (self.ends[-1] - self.ends[0])

    def padding(self) -> float:
        return 1 - sum(self.valid_tokens) / sum(self.tokens)


class RecordingTrainer(Trainer):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.history = History()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        tokens = inputs["input_ids"].numel()
        valid_tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else tokens
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.history.losses.append(loss.item())
        self.history.valid_tokens.append(valid_tokens)
        self.history.tokens.append(tokens)
        self.history.ends.append(time.perf_counter())
        return loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a saved model with its tokenizer (a random Llama)")
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer (20)")
    parser.add_argument("--batch_size", type=int, default=8, help="documents in a step (8)")
    parser.add_argument("--max_length", type=int, default=512, help="leave out documents of more tokens (512)")
    parser.add_argument("--learning_rate", type=float, help="falls to 0 from here (1e-3; with --model 2e-5)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast, with float32 weights")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations, for less memory")
    parser.add_argument("--output", type=Path, metavar="DIR", help="save the model trained on packed documents there")
    arguments = parser.parse_args()
    if arguments.model and not arguments.model.is_dir():
        parser.error(f"--model: got {arguments.model}, accepted is a folder")
    for name, least in (("steps", 2), ("batch_size", 1), ("max_length", 64)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: got {getattr(arguments, name)}, accepted is {least} or more")
    if arguments.learning_rate is None:
        arguments.learning_rate = 2e-5 if arguments.model else 1e-3
    return arguments


def functions() -> Iterator[tuple[str, str]]:
    """(prompt, answer): head and docstring of a function, and its body; in an order that mixes the modules."""
    documents = sorted(stdlib_documents())
    for _, source in random.Random(SEED).sample(documents, len(documents)):
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                docstring_end = node.body[0].end_lineno
                prompt, answer = lines[node.lineno - 1 : docstring_end], lines[docstring_end : node.end_lineno]
                yield b"".join(prompt).decode(errors="replace"), b"".join(answer).decode(errors="replace")


def load_tokenizer(folder: Path | None) -> Tokenize:
    """From a prompt and an answer to the tokens of both; the last one ends the document."""
    if folder is None:
        return lambda prompt, answer: ([BOUNDARY, *prompt.encode()], [*answer.encode(), BOUNDARY])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model: the tokenizer of {folder} has no eos_token, accepted is one that has")

    def tokenize(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return tokenizer(prompt)["input_ids"], [*answer_ids, tokenizer.eos_token_id]

    return tokenize


def load_examples(tokenize: Tokenize, count: int, max_length: int) -> list[Example]:
    """The first `count` documents of at most `max_length` tokens; those of the prompt have no label."""
    tokenized = (tokenize(prompt, answer) for prompt, answer in functions())
    fitting = ((prompt, answer) for prompt, answer in tokenized if len(prompt) + len(answer) <= max_length)
    examples = [
        {"input_ids": prompt + answer, "labels": [NO_LABEL] * len(prompt) + answer}
        for prompt, answer in islice(fitting, count)
    ]
    if len(examples) < count:
        raise ValueError(
            f"--steps, --batch_size: {count} documents wanted, of at most --max_length={max_length} tokens there are "
            f"{len(examples)}"
        )
    return examples


def pad(examples: list[Example]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (documents, longest of them) int64, padded on the right."""

    def padded(rows: list[list[int]], padding_value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding_value)

    return {
        "input_ids": padded([example["input_ids"] for example in examples], 0),
        "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": padded([example["labels"] for example in examples], NO_LABEL),
    }


def load_model(folder: Path | None, attention: str, max_length: int, device_type: str) -> PreTrainedModel:
    """In float32; with every attention the same weights."""
    if folder:
        return AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation=attention
        )
    hidden_size, num_layers, num_heads = SIZES[device_type]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        max_position_embeddings=max_length,
        bos_token_id=BOUNDARY,
        eos_token_id=BOUNDARY,
        attn_implementation=attention,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def training_arguments(arguments: argparse.Namespace, bf16: bool, device_type: str, folder: str) -> TrainingArguments:
    # Without the flag it is not mentioned: new versions of Transformers warn of its name.
    checkpointing = {"gradient_checkpointing": True} if arguments.gradient_checkpointing else {}
    result = TrainingArguments(
        output_dir=folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        bf16=bf16,
        seed=SEED,
        use_cpu=device_type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )
    if result.n_gpu > 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES: {result.n_gpu} GPUs are visible, accepted is one")
    return result


def train(
    model: PreTrainedModel, examples: list[Example], collate: Callable[[list[Example]], Any], options: TrainingArguments
) -> History:
    """Each step takes the same documents, whatever the collator."""
    trainer = RecordingTrainer(model=model, args=options, train_dataset=examples, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    if torch.cuda.is_available():
        gc.collect()  # the trainer before this one, which refers to itself, still holds its model
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if torch.cuda.is_available():
        trainer.history.peak_bytes = torch.cuda.max_memory_allocated()
    return trainer.history


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Over the steps; NaN if any loss is."""
    return (torch.tensor(losses) - torch.tensor(expected)).abs().max().item()


def report(histories: dict[str, History], expected: list[float]) -> int:
    """Prints the table, and returns the exit status.

    `expected` are eager's losses in float32. In bfloat16 eager is off too, and ours may be off twice as far.
    """
    print(f"\n{'attention':<16} {'batches':<8} {'padding':>7} {'tokens/s':>9} {'gain':>6}", end="")
    print(f" {'last loss':>9} {'largest difference':>19} {'peak MiB':>9}")
    ours = histories[OURS]
    for attention, history in histories.items():
        rate = history.tokens_per_second()
        peak = f"{history.peak_bytes / 2**20:,.0f}" if history.peak_bytes else "-"
        print(
            f"{attention:<16} {'packed' if history is ours else 'padded':<8} {history.padding():>7.0%} {rate:>9,.0f} "
            f"{ours.tokens_per_second() / rate:>5.2f}x {history.losses[-1]:>9.4f} "
            f"{largest_difference(history.losses, expected):>19.1e} {peak:>9}"
        )
    print(f"(tokens without padding; gain of {OURS} over each; loss difference from eager in float32, any step)")
    difference = largest_difference(ours.losses, expected)
    bar = LARGEST_LOSS_DIFFERENCE * max(expected) + 2 * largest_difference(histories["eager"].losses, expected)
    print(
        f"largest loss difference of {OURS}  {difference:.1e}  ≤ {bar:.1e}  {'ok' if difference <= bar else 'MISSED'}"
    )
    return 0 if difference <= bar else 1


def run(arguments: argparse.Namespace) -> int:
    if not is_accelerate_available():
        raise ImportError("transformers.Trainer needs accelerate, which is missing or too old: pip install accelerate")
    device_type = "cuda" if fa_ops.IS_AVAILABLE and torch.cuda.is_available() else "cpu"
    tokenize = load_tokenizer(arguments.model)
    examples = load_examples(tokenize, arguments.steps * arguments.batch_size, arguments.max_length)

    def learn(attention: str, bf16: bool) -> History:
        model = load_model(arguments.model, attention, arguments.max_length, device_type)
        collate = DataCollatorWithFlattening() if attention == OURS else pad
        with tempfile.TemporaryDirectory() as folder:
            history = train(model, examples, collate, training_arguments(arguments, bf16, device_type, folder))
        if attention == OURS and arguments.output:
            model.save_pretrained(arguments.output)
        return history

    lengths = [len(example["input_ids"]) for example in examples]
    print(
        f"{arguments.steps} steps of {arguments.batch_size} documents of {min(lengths)} to {max(lengths)} tokens; "
        f"{'bfloat16 autocast' if arguments.bf16 else 'float32'} on {device_type}"
    )
    histories = {attention: learn(attention, arguments.bf16) for attention in ATTENTIONS}
    expected = learn("eager", False) if arguments.bf16 else histories["eager"]
    return report(histories, expected.losses)


if __name__ == "__main__":
    options = parse_arguments()
    fa_ops.register_triton_attention()
    sys.exit(run(options))
