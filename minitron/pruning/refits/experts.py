"""prototype"""
from collections.abc import Callable, Iterable, Sequence
import torch
from torch import nn
from minitron.families.experts import Sent, experts_of
from minitron.pruning.refit import NormalEquations
from minitron.pruning.rotation import real_tokens

KNOBS = dict(sweeps=2, scale=False, ridge=1.0, sweep_ridge_to_current=False, order="shared", loo=False, least=0)

class _Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.heard = []
    def forward(self, hidden_ND, experts_NK, weights_NK):
        self.heard.append((hidden_ND, experts_NK, weights_NK))
        return torch.zeros_like(hidden_ND)

def sites(block, residuals, missing, masks, writers):
    """batchwise: given, experts, weights, outside contribution, inner of every writer, missing: real tokens"""
    experts, listener = block.mixer.experts, _Listener()
    block.mixer.experts = listener
    try:
        for residual_BTK, missing_BTK, mask in zip(residuals, missing, masks, strict=True):
            inner = {}
            handles = [block.get_submodule(w).register_forward_pre_hook(lambda _m, a, w=w: inner.__setitem__(w, a[0])) for w in writers]
            out = block(residual_BTK) - residual_BTK
            for h in handles: h.remove()
            heard = listener.heard.pop()
            flat = (lambda x: x) if mask is None else (lambda x: x[mask.flatten()])
            yield tuple(flat(x.flatten(0, -2) if x.ndim==3 else x) for x in heard), real_tokens(out, mask), real_tokens(missing_BTK, mask), {w: real_tokens(x, mask) for w, x in inner.items()}
    finally:
        block.mixer.experts = experts

def refit(block, residuals, missing, masks, recipe, store, place):
    mixer = block.mixer
    experts = experts_of(block)
    latent = getattr(mixer, "fc2_latent_proj", None)
    latent = latent if isinstance(latent, nn.Linear) else None
    shared = getattr(mixer, "shared_experts", None)
    writers = ["mixer.shared_experts.down_proj"] if shared is not None else []
    missing = list(missing)
    got = list(sites(block, residuals, missing, masks, writers))
    given_NL = torch.cat([g[0][0] for g in got]); experts_Nk = torch.cat([g[0][1] for g in got]); weights_Nk = torch.cat([g[0][2] for g in got])
    error_NK = torch.cat([g[2] - g[1] for g in got])
    assert latent is None
    sent = Sent(experts_Nk, len(experts))
    def of(j):
        tokens, places = sent.of(j)
        return tokens, weights_Nk.flatten()[places]
    start = {}
    total = 0
    for j in sent.reached:
        tokens, g = of(j)
        start[j] = experts[j].down_proj.weight.float().clone()
    def total_routed():
        t = torch.zeros_like(error_NK)
        for j in sent.reached:
            tokens, g = of(j)
            t[tokens] += experts[j](given_NL[tokens]) * g[:, None]
        return t
    routed = total_routed()
    scale = None
    if KNOBS["scale"]:
        c = float((routed*error_NK).sum()/routed.square().sum())
        scale = c
        for j in start:
            start[j] *= c
            store(f"mixer.experts.{j}.down_proj.weight", start[j])
        routed = routed * c
    error_NK -= routed
    report = [float(error_NK.square().mean())]
    start_shared = shared.down_proj.weight.float().clone() if shared is not None else None
    base = float(torch.cat([m for *_, m, _ in got]).square().mean()) if False else None
    def do_shared():
        w = shared.down_proj
        a_NS = torch.cat([g[3]["mixer.shared_experts.down_proj"] for g in got])
        eq = NormalEquations(w.in_features, w.out_features, error_NK.device)
        old = a_NS @ w.weight.float().T
        eq.add(a_NS, error_NK + old)
        new = eq.solve(start_shared, recipe.ridge, place=place)
        store("mixer.shared_experts.down_proj.weight", new)
        error_NK.add_(old - a_NS @ w.weight.float().T)
    def do_expert(j):
        tokens, g = of(j)
        if len(tokens) < KNOBS["least"]: return
        w = experts[j].down_proj
        A = experts[j].inner(given_NL[tokens]) * g[:, None]
        old = A @ w.weight.float().T
        T = error_NK[tokens] + old
        eq = NormalEquations(w.in_features, w.out_features, error_NK.device)
        eq.add(A, T)
        s = w.weight.float() if KNOBS["sweep_ridge_to_current"] else start[j]
        ridge = recipe.ridge * KNOBS["ridge"]
        if KNOBS.get("share"):
            n, F = A.shape
            ridge = max(ridge, KNOBS["share"] * F / n) / max(1.0, F / n)
        if KNOBS["loo"]:
            new, lam = loo_solve(A, T, s)
            report.append(("loo", j, len(tokens), lam))
        else:
            new = eq.solve(s, ridge, place=place)
        store(f"mixer.experts.{j}.down_proj.weight", new)
        error_NK[tokens] += old - A @ w.weight.float().T
    for sweep in range(KNOBS["sweeps"]):
        if recipe.refit_shared and shared is not None: do_shared()
        if recipe.refit_experts:
            for j in sent.reached: do_expert(j)
        report.append(float(error_NK.square().mean()))
    KNOBS.setdefault("log", []).append((place, scale, report, sent.counts))

GRID = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, .3, 1., 3.]
def loo_solve(A, T, start):
    A, T, start = A.double(), T.double(), start.double()
    R = T - A @ start.T
    G = A.T @ A
    d, V = torch.linalg.eigh(G)
    d = d.clamp_min(0)
    mean = G.diagonal().mean()
    AV = A @ V; C = V.T @ (A.T @ R)   # F,K
    best = None
    for r in GRID:
        lam = r * mean
        h = (AV.square() / (d + lam)).sum(1)
        res = R - AV @ (C / (d + lam)[:, None])
        loo = float((res / (1 - h).clamp_min(1e-6)[:, None]).square().sum())
        if best is None or loo < best[0]: best = (loo, r)
    lam = best[1] * mean
    return (start + (V @ (C / (d + lam)[:, None])).T).float(), best[1]
