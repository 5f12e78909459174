"""Three convolutions and a mean over time."""

from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        layers, channels = [], 1
        for i in range(3):
            # Stride only in frequency: coughs are short.
            layers += [nn.Conv2d(channels, width << i, 3, stride=(2, 1), padding=1), nn.ReLU()]
            channels = width << i
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 1)

    def forward(self, mel):
        return self.head(self.body(mel).mean((2, 3))).squeeze(1)
