"""How an attack steps: FGSM, I-FGSM, I-FGVM, P-FGVM, PGD and MI-FGSM (with DI and TI), in pixels of [0, 1].

All take images (N, 3, H, W) in [0, 1] of any float type and an objective, whose loss they descend. They compute with a
detached copy in float32 and return images of the same shape and type, within [0, 1] and the budget also after rounding
to that type. In the equations x is the image, x_i the iterate, g = grad l(x_i), clip_e the clipping to
[x - eps, x + eps]; each result is clipped to [0, 1]. A budget eps is the largest change of a pixel, such as 8 / 255.

Parameters
----------
images : the photos that are attacked
objective : what the attack wants, see ``objectives``
options : any of keep_best, stop_early and batch
keep_best : return the iterate of lowest loss instead of the last one
stop_early : stop each image at the first iterate that reaches the objective, confirmed in float32
batch : images per forward pass, by default 64, on a GPU 512; it changes time and memory, not the result, and is halved
    as long as the memory of a GPU is full

Raises
------
Invalid : for other images, budgets and options, for an objective that does not return two tensors (N,), for a loss
    without a gradient, and for an objective that holds a module in training mode
Failed : for a gradient that is not finite
"""

import functools
import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from faceadv import transfer
from faceadv.errors import Failed, Invalid, whole
from faceadv.images import believed
from faceadv.networks.common import generator
from faceadv.objectives import BATCH, Objective, answer, enter, evaluating, slope
from faceadv.precision import autocast, in_parts, together
from faceadv.store.paths import nearest

__all__ = ["fgsm", "ifgsm", "ifgvm", "mifgsm", "pfgvm", "pgd", "square"]

OPTIONS = {"keep_best": False, "stop_early": False, "batch": None}


def fgsm(images: Tensor, objective: Objective, *, eps: float, **options) -> Tensor:
    """x - eps sign(g). Source: Goodfellow et al. 2015, equation in section 4, descending a loss.

    Parameters
    ----------
    images, objective, options : as for all attacks
    eps : the change of every pixel
    """
    return ifgsm(images, objective, eps=eps, alpha=eps, steps=1, **options)


def ifgsm(
    images: Tensor, objective: Objective, *, eps: float, alpha: float | None = None, steps: int = 10, **options
) -> Tensor:
    """x_{i+1} = clip_e(x_i - alpha sign(g)). Source: Kurakin et al. 2017; slides of P-FGVM, I-FGSM.

    Parameters
    ----------
    images, objective, options : as for all attacks
    eps : the largest change of a pixel
    alpha : the length of a step, by default eps / steps
    steps : how many there are
    """
    steps, eps, alpha = _budget(steps, eps=eps, alpha=alpha)
    return _descend(images, objective, lambda x, g, o, m: (x - alpha * g.sign(), m), within(eps), steps, options)


def ifgvm(images: Tensor, objective: Objective, *, eps: float, alpha: float, steps: int = 10, **options) -> Tensor:
    """x_{i+1} = clip_e(x_i - alpha g), the raw gradient. Source: slides of P-FGVM, I-FGVM.

    Parameters
    ----------
    images, objective, options : as for all attacks
    eps : the largest change of a pixel
    alpha : the factor of the gradient
    steps : how many there are
    """
    steps, eps, alpha = _budget(steps, eps=eps, alpha=alpha)
    return _descend(images, objective, lambda x, g, o, m: (x - alpha * g, m), within(eps), steps, options)


def pfgvm(
    images: Tensor, objective: Objective, *, alpha: float, lam: float, steps: int = 100, start: Tensor | None = None,
    **options,
) -> Tensor:  # fmt: skip
    """x_{i+1} = clip_[0,1](x_i - alpha (g + lam (x_i - x))): no eps, a penalty holds the image near x instead.

    lam (x_i - x) is the slope of the penalty lam / 2 |x_i - x|^2. Without g, each step multiplies x_i - x by
    1 - alpha lam: from alpha lam = 1 on it jumps over x, and from 2 on it diverges.
    Source: Chatzikyriakidis, Papaioannidis and Pitas 2019, slide "Proposed method - P-FGVM".

    Parameters
    ----------
    images, objective, options : as for all attacks
    alpha : the factor of the slope
    lam : the weight of the penalty; alpha * lam must be below 1
    steps : how many there are
    start : the first iterate (N, 3, H, W) in [0, 1], by default the images; the penalty always holds to the images
    """
    steps, alpha, lam = _budget(steps, alpha=alpha, lam=lam)
    if alpha * lam >= 1:
        raise Invalid(f"alpha * lam must be below 1, or the penalty overshoots: {alpha} * {lam} is not.")

    def move(x, g, original, memory):
        return x - alpha * (g + lam * (x - original)), memory

    return _descend(images, objective, move, lambda x, original: x.clamp(0, 1), steps, options, start)


def pgd(
    images: Tensor, objective: Objective, *, eps: float, alpha: float | None = None, steps: int = 20,
    norm: str = "linf", seed: int | None = 0, **options,
) -> Tensor:  # fmt: skip
    """Projected gradient descent from a random start. Source: Madry et al. 2018, equation 2 and section 2.1.

    In L-infinity its step is that of I-FGSM; in L2 it is x_{i+1} = P_eps(x_i - alpha g / |g|_2), where P_eps is the
    projection onto the L2 ball.

    Parameters
    ----------
    images, objective, options : as for all attacks
    eps : the largest change: of a pixel, or with "l2" the norm of the whole image's change
    alpha : the length of a step in the same norm, by default 2.5 eps / steps
    steps : how many there are
    norm : "linf" or "l2"
    seed : of the random start in the ball; with None the attack starts at the images
    """
    if norm not in ("linf", "l2"):
        raise Invalid(f'norm must be "linf" or "l2", not {norm!r}.')
    linf = norm == "linf"
    steps, eps, alpha = _budget(steps, 2.5, largest=1 if linf else math.inf, eps=eps, alpha=alpha)
    start = None
    if seed is not None:
        x, draw = enter(images), generator(seed)
        if linf:
            noise = (torch.rand(x.shape, generator=draw) * 2 - 1) * eps
        else:  # uniform in the ball: a random direction, and a radius that is the d-th root of a uniform number
            noise = torch.randn(x.shape, generator=draw)
            radius = torch.rand(len(x), 1, 1, 1, generator=draw) ** (1 / x.shape[1:].numel())
            noise = noise / _norm(noise) * radius * eps
        start = (x + noise.to(x)).clamp(0, 1)

    def move(x, g, original, memory):
        return x - (alpha * g.sign() if linf else alpha * g / _norm(g)), memory

    def onto_the_ball(x, original):
        moved = x - original
        return (original + moved * (eps / _norm(moved)).clamp(max=1)).clamp(0, 1)

    return _descend(images, objective, move, within(eps) if linf else onto_the_ball, steps, options, start)


def mifgsm(
    images: Tensor, objective: Objective, *, eps: float, alpha: float | None = None, steps: int = 10, mu: float = 1.0,
    diversity: int | None = None, smoothing: int = 1, **options,
) -> Tensor:  # fmt: skip
    """m_{i+1} = mu m_i + g / |g|_1, x_{i+1} = clip_e(x_i - alpha sign(m_{i+1})).

    Two options help it to transfer to networks that it does not know. With both it is DI-TI-MI-FGSM.
    Source: Dong et al. 2018, equations 6 and 7; Xie et al. 2019, algorithm 1; Dong et al. 2019, equation 7.

    Parameters
    ----------
    images, objective, options : as for all attacks
    eps : the largest change of a pixel
    alpha : the length of a step, by default eps / steps
    steps : how many there are
    mu : how much of the last step's direction is kept
    diversity : seed of diverse inputs (DI): at each step half of the images are shrunk by up to a tenth, somewhere on
        black, before the network sees them; None for none
    smoothing : side of the Gaussian kernel, odd, that g is smoothed with (translation invariance, TI), three standard
        deviations to each side as in the authors' code; 1 for none
    """
    steps, eps, alpha, mu = _budget(steps, eps=eps, alpha=alpha, mu=mu)
    smoothing = transfer.odd(smoothing)
    view = None if diversity is None else transfer.diverse(steps, len(images), diversity)

    def move(x, g, original, memory):
        g = transfer.smooth(g, smoothing)
        memory = mu * memory + g / g.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
        return x - alpha * memory.sign(), memory

    return _descend(images, objective, move, within(eps), steps, options, view=view)


def square(
    images: Tensor, objective: Objective, *, eps: float, queries: int = 500, share: float = 0.1, seed: int = 0,
    batch: int | None = None,
) -> Tensor:  # fmt: skip
    """The Square attack: a random search that needs no gradient, only the loss of what it tries.

    It starts from vertical stripes of +-eps. Each query repaints one square with a colour of +-eps in each channel and
    keeps it where the loss has fallen; the squares get smaller. Source: Andriushchenko et al. 2020, algorithms 1 and 2.

    Parameters
    ----------
    images, objective, batch : as for all attacks; the loss needs no gradient
    eps : the change of every pixel
    queries : how often each image is tried
    share : of the image's area that the first squares cover, in (0, 1]
    seed : of the stripes, places and colours; the same for each image in any batch
    """
    queries, eps, share = _budget(queries, eps=eps, share=share)
    evaluating(objective)
    x, draw = enter(images), generator(seed)
    size = together(BATCH, x.device) if batch is None else whole("batch", batch, 1)
    count, channels, height, width = x.shape
    stripes = torch.randint(2, (count, channels, 1, width), generator=draw).to(x) * 2 - 1
    sides = [max(1, round((share * _shrunk(q / queries) * height * width) ** 0.5)) for q in range(queries)]
    colours = torch.randint(2, (queries, count, channels, 1, 1), generator=draw) * 2 - 1
    corners = torch.rand(queries, 2, count, generator=draw)

    def tried(rows):
        original, known = x[rows], rows.cpu()
        best, lowest = (original + eps * stripes[rows]).clamp(0, 1), None
        y, z = torch.arange(height), torch.arange(width)
        for q, side in enumerate(sides):
            with torch.no_grad():
                if lowest is None:
                    lowest = answer(objective(best, rows), len(rows))[0].float()
                top, left = ((corners[q, i, known] * (end - side + 1)).long() for i, end in enumerate((height, width)))
                inside = ((y >= top[:, None]) & (y < top[:, None] + side))[:, None, :, None]
                inside = inside & ((z >= left[:, None]) & (z < left[:, None] + side))[:, None, None, :]
                painted = (original + eps * colours[q, known].to(x)).clamp(0, 1)
                new = torch.where(inside.to(x.device), painted, best)
                loss = answer(objective(new, rows), len(rows))[0].float()
            better = loss < lowest
            lowest, best = torch.where(better, loss, lowest), torch.where(better[:, None, None, None], new, best)
        return best

    if not len(x):
        return images.detach().clone()
    done = in_parts(tried, torch.arange(len(x), device=x.device), size)
    return leave(torch.cat(done), images, within(eps))


def _shrunk(spent):
    """How the squares' share of the area falls with the share of the queries that are spent (of 10,000 queries)."""
    steps = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    return 0.5 ** sum(spent > step for step in steps)


def within(eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (x, original): x clipped to [original - eps, original + eps] and to [0, 1], in one pass."""
    return lambda x, original: x.clamp((original - eps).clamp_(min=0), (original + eps).clamp_(max=1))


def _norm(x):
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def _budget(steps, pace=1.0, largest=1, **values):
    """Steps as an int and the values as floats, alpha being pace * eps / steps by default, or ``Invalid``."""
    steps = whole("steps", steps, 1)
    for name, value in values.items():
        if name == "alpha" and value is None and "eps" in values:
            value = pace * values["eps"] / steps
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise Invalid(f"{name} must be a finite number of at least 0, not {value!r}.")
        if name == "eps" and value > largest:
            raise Invalid(f"eps must be at most 1, because pixels lie in [0, 1]: did you mean {value:g}/255?")
        values[name] = float(value)
    return steps, *values.values()


def leave(moved: Tensor, images: Tensor, project: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The float32 result of an attack in the dtype of the images, within the budget after the rounding too."""
    if images.dtype == torch.float32:
        return moved
    x = images.detach().double()
    exact = project(x + (moved.double() - x.float().double()), x)
    near = exact.to(images.dtype)
    # The next number towards the image: read as whole numbers, the bits of positive floats are in the floats' order.
    bits = {2: torch.int16, 8: torch.int64}[near.element_size()]
    nearer = (near.view(bits) + torch.where(x > near, 1, -1).to(bits)).view(near.dtype)
    return torch.where((near.double() - x).abs() > (exact - x).abs(), nearer, near)


def _descend(images, objective, move, project, steps, options, start=None, view=None):
    """The loop that all attacks share, batch by batch."""
    for name in options.keys() - OPTIONS.keys():
        raise Invalid(f'An attack has no option "{name}"{nearest(name, OPTIONS)}; there are {", ".join(OPTIONS)}.')
    options = OPTIONS | options
    x, batch = enter(images), options["batch"]
    batch = together(BATCH, x.device) if batch is None else whole("batch", batch, 1)
    start = x if start is None else enter(start)
    if start.shape != x.shape:
        raise Invalid(f"start must have the shape of the images, {tuple(x.shape)}, not {tuple(start.shape)}.")
    evaluating(objective)
    if not len(x):
        return images.detach().clone()

    def step(x, g, original, memory):
        x, memory = move(x, g, original, memory)
        return project(x, original), memory

    def attacked(rows):
        return _descend_batch(x[rows], objective, step, steps, start[rows], options, rows, view)

    done = in_parts(attacked, torch.arange(len(x), device=x.device), batch)
    return leave(torch.cat(done), images, project)


def _descend_batch(original, objective, step, steps, start, options, rows, view):
    keep_best, stop_early = options["keep_best"], options["stop_early"]
    x, memory = start.clone(), torch.zeros_like(original)
    result, lowest = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
    active = torch.arange(len(x), device=x.device)  # where in the batch the images still under attack are
    # where a gradient was not finite; a GPU would be waited for, so there it is looked at once, at the end
    broken, waits = torch.zeros(len(x), dtype=torch.bool, device=x.device), x.device.type != "cpu"
    for number in range(steps):
        with believed(waits and number > 0):
            g, loss, reached = _gradient(objective, x, rows[active], view and functools.partial(view, number))
        broken[active] = broken[active] | ~g.flatten(1).sum(1).isfinite()
        if not waits:
            _refuse(broken)
        if keep_best:
            _keep(result, lowest, active, loss, x)
        if stop_early and reached.any():
            with torch.no_grad(), autocast(x.device, fast=False):  # the fast precision may err
                sure = answer(objective(x[reached], rows[active[reached]], exact=True), int(reached.sum()))[1]
                reached = reached.masked_scatter(reached, sure)
            result[active[reached]] = x[reached]
            going = ~reached
            active, x, g, memory = active[going], x[going], g[going], memory[going]
            if not len(active):
                break
        x, memory = step(x, g, original[active], memory)
    if keep_best and len(active):
        with torch.no_grad(), believed(waits):
            loss, _ = objective(x, rows[active])
        _keep(result, lowest, active, loss.float(), x)
    elif len(active):
        result[active] = x
    _refuse(broken)
    return result


def _keep(result, lowest, active, loss, x):
    """Write those of the iterates that have the lowest loss so far into the result."""
    better = loss < lowest[active]
    lowest[active] = torch.where(better, loss, lowest[active])
    result[active] = torch.where(better[:, None, None, None], x, result[active])


def _refuse(broken):
    if broken.any():
        raise Failed(
            f"The gradient of {int(broken.sum())} of {len(broken)} images is not finite: the loss has no slope there."
        )


def _gradient(objective, x, rows, view):
    """Gradient of each image's loss in the image alone, the loss in float32, and what is reached.

    view : a function of (x, rows) that gives the images as the objective sees them, or None
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        loss, reached = answer(objective(view(x, rows) if view else x, rows), len(x))
        if not loss.requires_grad:
            none = "for a purifier that has none there is adaptive.straight_through."
            raise Invalid(f"The loss of an objective must have a gradient in the images; {none}")
        g = slope(loss, x, exact=not getattr(objective, "fast", True))
    return g, loss.detach().float(), reached
