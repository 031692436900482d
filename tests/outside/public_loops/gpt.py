"""A small GPT: accumulation over ragged micro-batches, groups without weight decay, bfloat16, warmup and cosine."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from steploop import Optimizer, TrainState, accumulate, fold_in, optimizer_step, schedule, unscale_and_clip

SEED, STEPS, VOCABULARY, LENGTH = 5, 20, 13, 8


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.mix(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(b, t, c)))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(SEED)
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def next_token(model, tokens):
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randint(VOCABULARY, (size, LENGTH), generator=generator) for size in (6, 6, 3)]
        for _ in range(STEPS)
    ]


def warmup_and_cosine(step):
    return (step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / (STEPS - 5)))


def by_hand(data):
    model = GPT()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = LambdaLR(optimizer, warmup_and_cosine)
    for step, parts in enumerate(data):
        optimizer.zero_grad()
        samples = sum(len(part) for part in parts)
        for number, part in enumerate(parts):
            torch.manual_seed(fold_in(SEED, step, number))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = next_token(model, part)
            (loss * (len(part) / samples)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return dict(model.named_parameters())


def rate(step):
    return 3e-3 * warmup_and_cosine(step)


def initial():
    optimizer = Optimizer(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), no_decay=True)
    return schedule(TrainState.create(GPT(), optimizer, seed=SEED, precision="bf16"), rate)


def train_step(state, parts):
    state = accumulate(state, parts, next_token)
    state = unscale_and_clip(state, max_norm=1.0)
    state = optimizer_step(state)
    return schedule(state, rate)
