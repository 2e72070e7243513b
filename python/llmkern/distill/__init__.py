"""Distillation: a student learns what its teacher predicts, in any training loop.

wrapper = DistillWrapper(drop_layers(teacher), teacher)   # or a TeacherCache of the training data
Trainer(wrapper, arguments, train_dataset=data).train()   # saves the student as stock transformers loads it

Sources: Hinton et al., arXiv 1503.02531 (temperature and T²); DistilBERT, arXiv 1910.01108 (every other layer, cosine
of hidden states); SquareHead, arXiv 2310.06927; random sampling of the teacher's distribution, arXiv 2503.16870.
"""

from __future__ import annotations

from llmkern.distill.depth import drop_layers
from llmkern.distill.hidden import cosine, squarehead
from llmkern.distill.teacher_cache import TeacherCache
from llmkern.distill.vocabulary import check_tokenizers
from llmkern.distill.wrapper import DistillWrapper
from llmkern.ops import DistillLoss, linear_kl_div, linear_kl_div_topk

__all__ = [
    "DistillLoss",
    "DistillWrapper",
    "TeacherCache",
    "check_tokenizers",
    "cosine",
    "drop_layers",
    "linear_kl_div",
    "linear_kl_div_topk",
    "squarehead",
]
