"""A training script as people have it, for `cloudtrain launch`: it knows nothing of this package. Started as a program.

python _plain_script.py OUTPUT_DIR [SECONDS]          SECONDS of pause after each step, so that a kill finds it training
"""

import sys
import time

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)


def main() -> None:
    torch.set_num_threads(1)
    args = TrainingArguments(
        sys.argv[1],
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    set_seed(args.seed)
    words = torch.Generator().manual_seed(7)
    rows = [
        {"input_ids": torch.randint(0, 64, (8,), generator=words), "labels": torch.tensor(number % 2)}
        for number in range(48)
    ]
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **size))
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Slow()])
    trainer.train()
    if args.process_index == 0:
        save_file(model.state_dict(), f"{sys.argv[1]}/weights.safetensors")


if __name__ == "__main__":
    main()
