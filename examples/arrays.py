"""rnnfast on NumPy arrays, without PyTorch: an LSTM learns to predict a sine by gradient descent."""

import numpy as np

from rnnfast import arrays

rng = np.random.default_rng(0)
T, B, H = 40, 16, 32
phase = rng.uniform(0, 2 * np.pi, (1, B, 1))
wave = np.sin(np.arange(T + 1)[:, None, None] / 4 + phase).astype(np.float32)
x, target = wave[:-1], wave[1:]


def uniform(*shape: int) -> np.ndarray:
    return rng.uniform(-(H**-0.5), H**-0.5, shape).astype(np.float32)


# torch.nn.LSTM's layout: the gates i, f, g, o
weights = arrays.Weights(
    w_ih=uniform(4 * H, 1), w_hh=uniform(4 * H, H), b_ih=uniform(4 * H), b_hh=uniform(4 * H)
)
head = uniform(H, 1)

for step in range(301):
    out = arrays.forward("lstm", x, weights, save=True)
    error = out.y @ head - target
    if step % 50 == 0:
        print(f"step {step:3}  mean squared error {np.mean(error**2):.5f}")
    d_error = 2 * error / error.size
    grads = out.backward(dy=d_error @ head.T)
    head -= 0.3 * np.einsum("tbh,tbo->ho", out.y, d_error)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        weight = getattr(weights, name)
        weight -= 0.3 * getattr(grads, name)
