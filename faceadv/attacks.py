"""How an attack steps: FGSM, I-FGSM, I-FGVM, P-FGVM, PGD and MI-FGSM, in pixels of [0, 1].

All take images (N, 3, H, W) and an objective, whose loss they descend, and return images of the same shape within
[0, 1] and the budget. In the equations x is the image, x_i the iterate, g = grad l(x_i), clip_e the clipping to
[x - eps, x + eps]; each result is clipped to [0, 1].

Options that all iterative attacks share:

keep_best   return the iterate of lowest loss instead of the last one
stop_early  stop each image at the first iterate that reaches the objective, confirmed in float32
batch       images per forward pass: it changes time and memory, not the result
"""

import torch

from faceadv.errors import Failed, Invalid
from faceadv.images import check_images


def fgsm(images, objective, *, eps, batch=64):
    """x - eps sign(g). Source: Goodfellow et al. 2015, equation in section 4, descending a loss."""
    return ifgsm(images, objective, eps=eps, alpha=eps, steps=1, batch=batch)


def ifgsm(images, objective, *, eps, alpha=None, steps=10, keep_best=False, stop_early=False, batch=64):
    """x_{i+1} = clip_e(x_i - alpha sign(g)); alpha is eps / steps by default.

    Source: Kurakin et al. 2017; slides of P-FGVM, I-FGSM.
    """
    _check(steps, eps=eps, alpha=alpha)
    alpha = eps / steps if alpha is None else alpha

    def step(x, g, original, memory):
        return _clip(x - alpha * g.sign(), original, eps), memory

    return _descend(images, objective, step, steps, images, keep_best, stop_early, batch)


def ifgvm(images, objective, *, eps, alpha, steps=10, keep_best=False, stop_early=False, batch=64):
    """x_{i+1} = clip_e(x_i - alpha g), the raw gradient. Source: slides of P-FGVM, I-FGVM."""
    _check(steps, eps=eps, alpha=alpha)

    def step(x, g, original, memory):
        return _clip(x - alpha * g, original, eps), memory

    return _descend(images, objective, step, steps, images, keep_best, stop_early, batch)


def pfgvm(images, objective, *, alpha, lam, steps=100, start=None, keep_best=False, stop_early=False, batch=64):
    """x_{i+1} = clip_[0,1](x_i - alpha (g + lam (x_i - x))): no eps, the penalty holds the image near x instead.

    The penalty is the slope of lam / 2 |x_i - x|^2; its step alone goes to x if alpha lam < 1 and would diverge from
    2 on, so ``ValueError`` from 1. start: another first iterate (N, 3, H, W) in [0, 1], x still being the anchor.
    Source: Chatzikyriakidis, Papaioannidis and Pitas 2019, slide "Proposed method - P-FGVM".
    """
    _check(steps, alpha=alpha, lam=lam)
    if alpha * lam >= 1:
        raise Invalid(f"alpha * lam must be below 1, or the penalty overshoots: {alpha} * {lam} is not.")
    if start is not None:
        check_images(start)

    def step(x, g, original, memory):
        return (x - alpha * (g + lam * (x - original))).clamp(0, 1), memory

    return _descend(images, objective, step, steps, images if start is None else start, keep_best, stop_early, batch)


def pgd(
    images,
    objective,
    *,
    eps,
    alpha=None,
    steps=20,
    norm="linf",
    random_start=True,
    seed=0,
    keep_best=False,
    stop_early=False,
    batch=64,
):
    """Projected gradient descent from a random start in the ball; alpha is 2.5 eps / steps by default.

    norm "linf": as I-FGSM; norm "l2": x_{i+1} = P_eps(x_i - alpha g / |g|_2), P_eps the projection onto the L2 ball,
    eps and alpha in the norm of the whole image. Source: Madry et al. 2018, equation 2 and section 2.1.
    """
    if norm not in ("linf", "l2"):
        raise Invalid(f'norm must be "linf" or "l2", not {norm!r}.')
    _check(steps, eps=eps, alpha=alpha)
    alpha = 2.5 * eps / steps if alpha is None else alpha
    check_images(images)
    start = images
    if random_start:
        generator = torch.Generator().manual_seed(seed)
        if norm == "linf":
            noise = (torch.rand(images.shape, generator=generator) * 2 - 1) * eps
        else:  # uniform in the ball: a random direction, and a radius that is the d-th root of a uniform number
            noise = torch.randn(images.shape, generator=generator)
            radius = torch.rand(len(images), 1, 1, 1, generator=generator) ** (1 / images[0].numel())
            noise = noise / _norm(noise) * radius * eps
        start = (images + noise.to(images)).clamp(0, 1)

    def step(x, g, original, memory):
        if norm == "linf":
            return _clip(x - alpha * g.sign(), original, eps), memory
        moved = x - alpha * g / _norm(g) - original
        return (original + moved * (eps / _norm(moved)).clamp(max=1)).clamp(0, 1), memory

    return _descend(images, objective, step, steps, start, keep_best, stop_early, batch)


def mifgsm(images, objective, *, eps, alpha=None, steps=10, mu=1.0, keep_best=False, stop_early=False, batch=64):
    """m_{i+1} = mu m_i + g / |g|_1, x_{i+1} = clip_e(x_i - alpha sign(m_{i+1})); alpha is eps / steps by default.

    Source: Dong et al. 2018, equations 6 and 7.
    """
    _check(steps, eps=eps, alpha=alpha, mu=mu)
    alpha = eps / steps if alpha is None else alpha

    def step(x, g, original, memory):
        memory = mu * memory + g / g.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
        return _clip(x - alpha * memory.sign(), original, eps), memory

    return _descend(images, objective, step, steps, images, keep_best, stop_early, batch)


def _clip(x, original, eps):
    return x.clamp((original - eps).clamp_(min=0), (original + eps).clamp_(max=1))  # both clippings in one pass


def _norm(x):
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def _check(steps, **budget):
    """Raise ``ValueError`` for a budget that cannot be meant; None stands for a default still to come."""
    if not isinstance(steps, int) or steps < 1:
        raise Invalid(f"steps must be a whole number of at least 1, not {steps!r}.")
    for name, value in budget.items():
        if value is not None and not 0 <= value < float("inf"):
            raise Invalid(f"{name} must be a finite number of at least 0, not {value!r}.")


def _descend(images, objective, step, steps, start, keep_best, stop_early, batch):
    """The loop that all attacks share, batch by batch."""
    check_images(images)
    rows = torch.arange(len(images), device=images.device)
    results = [
        _descend_batch(images[r], objective, step, steps, start[r], keep_best, stop_early, r) for r in rows.split(batch)
    ]
    return torch.cat(results) if results else images.clone()


def _descend_batch(original, objective, step, steps, start, keep_best, stop_early, rows):
    x, memory = start.detach().clone(), torch.zeros_like(original)
    result, lowest = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
    active = torch.arange(len(x), device=x.device)  # where in the batch the images still under attack are
    for _ in range(steps):
        g, loss, reached = _gradient(objective, x, rows[active])
        if keep_best:
            better = loss < lowest[active]
            lowest[active[better]], result[active[better]] = loss[better], x[better]
        if stop_early and reached.any():
            reached = _confirm(objective, x, rows[active], reached)
            result[active[reached]] = x[reached]
            going = ~reached
            active, x, g, memory = active[going], x[going], g[going], memory[going]
            if not len(active):
                return result
        x, memory = step(x, g, original[active], memory)
    if keep_best:
        with torch.no_grad():
            loss, _ = objective(x, rows[active])
        better = loss < lowest[active]
        result[active[better]] = x[better]
    else:
        result[active] = x
    return result


def _gradient(objective, x, rows):
    """Gradient of each image's loss in the image alone. Raises ``RuntimeError`` if it is not finite."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        loss, reached = objective(x, rows)
        (g,) = torch.autograd.grad(loss.sum(), x)
    if not g.sum().isfinite():  # cheaper than to look at each
        bad = ~g.isfinite().flatten(1).all(1)
        if bad.any():
            raise Failed(
                f"The gradient of {int(bad.sum())} of {len(x)} images is not finite: the loss has no slope there."
            )
    return g, loss.detach(), reached


@torch.no_grad()
def _confirm(objective, x, rows, reached):
    """What the fast precision takes for reached, decided in float32."""
    confirmed = reached.clone()
    confirmed[reached] = objective(x[reached], rows[reached], exact=True)[1]
    return confirmed
