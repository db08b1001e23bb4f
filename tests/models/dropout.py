"""Dropout of every kind, as module, function and argument; attributes that are merely called after it; no dropout."""

import torch
from torch import nn
from torch.nn import functional

BATCH_SIZE = 8


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=True)
        self.plain = nn.GRU(8, 8, batch_first=True)
        self.rate = 0.4

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        x = self.recurrent(x)[0] + self.plain(x)[0]
        return x + functional.scaled_dot_product_attention(x, x, x, dropout_p=self.rate if self.training else 0.0)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.rate, self.drop_scale, self.dropped_by = 0.3, 0.25, 1.5

    def forward(self, x):
        x = functional.dropout(self.linear(x), self.rate, self.training) * self.drop_scale - self.dropped_by
        x = functional.feature_alpha_dropout(x, self.rate, self.training)
        return torch.dropout(functional.dropout1d(x, self.rate, self.training), self.rate, self.training)


class Dropouts(nn.Module):
    def __init__(self):
        super().__init__()
        kinds = [nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.Dropout1d(0.3), nn.AlphaDropout(0.3)]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), kind, nn.Linear(8, 8)) for kind in kinds)
        self.functional, self.mixing, self.head = Functional(), Mixing(), nn.Linear(8, 3)
        self.layers[1][1].eval()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.mixing(x + self.functional(x)).mean(1))


def build_model():
    return Dropouts()


def silence(model):
    """Dropout off, by hand and by name, for a comparison that shares no code with the one under test."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    model.mixing.attention.dropout = model.mixing.recurrent.dropout = 0.0
    model.mixing.rate = model.functional.rate = 0.0


def make_batch(batch_size):
    return torch.randn(batch_size, 5, 8), torch.randint(0, 3, (batch_size,))


def loss_fn(output, targets):
    return functional.cross_entropy(output, targets)
