"""The shortest complete training: digits, a perceptron, NLCG.

python examples/minimal.py      # needs scikit-learn
"""

import torch
from fastnlcg import NLCG, warmup_cosine
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

epochs, batch = 20, 256
optimizer = NLCG(model.parameters(), lr=3e-3)
schedule = warmup_cosine(optimizer, total_steps=epochs * -(-len(x) // batch))
for _ in range(epochs):
    for part in torch.randperm(len(x)).split(batch):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        schedule.step()

accuracy = (model(x).argmax(1) == y).float().mean()
print(f"loss {loss.item():.4f}, training accuracy {100 * accuracy:.1f} %")
print(optimizer.diagnostics())
