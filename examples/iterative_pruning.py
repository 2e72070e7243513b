"""Prune half of the weights while a model is fine-tuned by the stock Trainer: iterative_pruning.py [MODEL OUT STEPS]"""

import sys

from transformers import Trainer, TrainerCallback, TrainingArguments

from llmkern import data, prune
from llmkern.models import load_model


class Prune(TrainerCallback):
    """Every few steps more weights go, along a cubic schedule; between, the masks hold."""

    masks = None

    def on_step_begin(self, args, state, control, model, optimizer, **others):
        """Before each step of the optimizer."""
        if state.global_step % 5 == 0:
            share = prune.cubic_schedule(state.global_step, start=0, end=args.max_steps * 3 // 4, final=0.5)
            self.masks = prune.magnitude_(model, share, masks=self.masks).attach(optimizer)


def main(name: str = "smollm2", out: str = "out/iterative", steps: int = 40) -> None:
    """Fine-tune on the builtin text, from dense to half of the weights, and save for stock transformers."""
    model, tokenizer = load_model(name)
    windows = data.calibration_windows(data.token_ids(tokenizer, data.builtin_text()), 4 * int(steps), 128)
    arguments = TrainingArguments(out, max_steps=int(steps), per_device_train_batch_size=4, learning_rate=1e-4)
    examples = [{"input_ids": window, "labels": window} for window in windows]
    pruning = Prune()
    Trainer(model, arguments, train_dataset=examples, callbacks=[pruning]).train()
    print(f"{pruning.masks.check().sparsity():.0%} of the weights of the linear layers are 0")
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
