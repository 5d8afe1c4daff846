"""What a ``steering`` field does to one sequence, by arithmetic of the reference's own.

All positions are worked out at once: causality makes that the same as token by token. Only a
condition over the whole prompt looks ahead in the pass, so the prompt goes through alone before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.engine.reference import ReferenceSAE

Field = Mapping[str, Any]


class ReferencePass:
    """One sequence on its way through the model.

    Args:
        saes: by name.
        field: the request's, or nothing.
        ids: the tokens that enter the model.
        prompt_len: how many of them are the prompt's.
        special: token ids that edits leave alone.
        prompt: the pass of the prompt alone; None if this is it.

    Attributes:
        seen: by SAE, the stream ``[n, d_in]`` before the edits.
        left: by SAE, the stream behind them.
        covered: by edit, ``[n]`` positions that it covers.
        skipped: by edit, those of them that are sinks.
        held: by edit, those where its conditions hold, be they none.
        f: by edit, ``[n]`` its feature before the edits.
        shares: by hook point, ``[n]`` shares of the change (NaN: not edited), and where limited.
        nearest: how near anything came to where a rounding difference decides.
    """

    def __init__(
        self,
        saes: Mapping[str, ReferenceSAE],
        field: Field,
        ids: Sequence[int],
        prompt_len: int,
        special: set[int],
        prompt: ReferencePass | None = None,
    ) -> None:
        self.saes, self.field, self.ids, self.prompt_len = saes, field, ids, prompt_len
        self.ordinary = torch.tensor([t > 0 and i not in special for t, i in enumerate(ids)])
        self.prompt = prompt
        self.items: list[dict[str, Any]] = list(field.get("interventions") or [])
        self.seen: dict[str, Tensor] = {}
        self.left: dict[str, Tensor] = {}
        self.covered: dict[int, Tensor] = {}
        self.skipped: dict[int, Tensor] = {}
        self.held: dict[int, Tensor] = {}
        self.f: dict[int, Tensor] = {}
        self.shares: dict[str, tuple[Tensor, Tensor]] = {}
        self.nearest = torch.inf

    def change(self, names: Sequence[str], x: Tensor) -> Tensor:
        """What the edits at one hook point, where these SAEs sit, add to a stream ``[n, d_in]``."""
        for name in names:
            self.seen[name] = x.clone()
        total, touched = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for name in names:
            delta, edited = self._change_of(name, x)
            total, touched = total + delta, touched | edited
        share = total.norm(dim=-1) / x.norm(dim=-1)
        most = self.field.get("max_share")
        limited = touched & (share > most) if most is not None else torch.zeros_like(touched)
        if most is not None and touched.any():
            self._near((share[touched] - most).abs())
            total = torch.where(limited[:, None], total * (most / share)[:, None], total)
            share = share.clamp(max=most)
        for name in names:
            self.left[name] = x + total
        self.shares[self.saes[names[0]].hook] = share.masked_fill(~touched, torch.nan), limited
        return total

    def report(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """``interventions``, their counts and activations alone, and ``edited``."""
        entries = []
        for i, item in enumerate(self.items):
            edited = self.covered[i] & ~self.skipped[i] & self.held[i]
            f = self.f[i][edited]
            entry = {
                "tokens_edited": int(edited.sum()),
                "tokens_skipped": int(self.skipped[i].sum()),
                "tokens_active": int((f > 0).sum()),
                "mean_activation": float(f.mean()) if len(f) else None,
                "max_activation": float(f.max()) if len(f) else None,
            }
            if self._conditions(item):
                held_back = self.covered[i] & ~self.skipped[i] & ~self.held[i]
                entry["tokens_held_back"] = int(held_back.sum())
            entries.append(entry)
        hooks = []
        for hook, (share, limited) in self.shares.items():
            edited_shares = share[~share.isnan()]
            if len(edited_shares):
                hooks.append(
                    {
                        "hook": hook,
                        "tokens": len(edited_shares),
                        "mean_share": float(edited_shares.mean()),
                        "max_share": float(edited_shares.max()),
                        "tokens_limited": int(limited.sum()),
                    }
                )
        return entries, hooks

    def _change_of(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """One SAE's part, and the tokens where it edits."""
        sae = self.saes[name]
        f = sae.encode(x)
        f_new, touched = f.clone(), torch.zeros(len(x), dtype=torch.bool)
        sink = self._sinks(name)
        # With `reread` all edits of an SAE cover the same tokens.
        solved: list[tuple[int, Tensor]] = []
        for i, item in enumerate(self.items):
            if item.get("sae", name) != name:
                continue
            covered = self._covered(item)
            self.f[i], self.covered[i], self.skipped[i] = (
                f[:, item["feature"]],
                covered,
                (covered & sink),
            )
            self.held[i] = self._holds(item)
            where = covered & ~sink & self.held[i]
            touched |= where
            column = item["feature"]
            new = _applied(item, f_new[:, column], f[:, column])
            f_new[:, column] = torch.where(where, new, f_new[:, column])
            solved.append((column, where))
        if not solved:
            return torch.zeros_like(x), touched
        columns = list(dict.fromkeys(column for column, _ in solved))
        if self.field.get("match") == "reread":
            delta = self._solved(name, x, f, f_new, columns)
        elif self.field.get("error_term", True):
            rows = self._rows(name, columns)
            delta = (f_new - f)[:, columns] @ rows * sae.output_scale(x)
        else:
            delta = sae.decode(f_new, x) - x
        return delta * touched[:, None], touched

    def _solved(self, name: str, x: Tensor, f: Tensor, f_new: Tensor, columns: list[int]) -> Tensor:
        sae = self.saes[name]
        p, theta = sae.preactivation(x)[:, columns], sae.threshold[columns]
        f, f_new = f[:, columns], f_new[:, columns]
        changed = f_new != f
        if changed.any():
            self._near((f_new - theta)[changed].abs())
        silent = torch.minimum(p, 0.9 * theta)
        wanted = torch.where(changed, torch.where(f_new > theta, f_new, silent), p)
        rows = self._rows(name, columns).double().numpy()
        gains = sae.weights["W_enc"][:, columns].T.double().numpy() @ rows.T
        alpha = np.linalg.solve(gains, (wanted - p).double().numpy().T).T
        return torch.from_numpy(alpha @ rows).float()

    def _rows(self, name: str, columns: list[int]) -> Tensor:
        """Decoder rows, less what would move protected features."""
        sae = self.saes[name]
        rows = sae.weights["W_dec"][columns]
        encoders = [
            self.saes[item.get("sae", name)].weights["W_enc"][:, item["feature"]]
            for item in self.field.get("protect") or ()
            if self.saes[item.get("sae", name)].hook == sae.hook
        ]
        if not encoders:
            return rows
        beside = torch.stack(encoders, dim=1).double().numpy()
        target = rows.T.double().numpy()
        kept = target - beside @ np.linalg.lstsq(beside, target, rcond=None)[0]
        return torch.from_numpy(kept.T).float()

    def _covered(self, item: dict[str, Any]) -> Tensor:
        where = {**(self.field.get("positions") or {}), **(item.get("positions") or {})}
        t = torch.arange(len(self.ids))
        # As a slice of the prompt would have it.
        start, end = (
            max(bound + self.prompt_len, 0) if bound < 0 else bound
            for bound in (where.get("start", 0), where.get("end", 10**9))
        )
        in_prompt = t < self.prompt_len
        phase = in_prompt & where.get("prompt", True) | ~in_prompt & where.get("generation", True)
        kind = self.ordinary | where.get("special_tokens", False)
        covered: Tensor = phase & kind & (t >= start) & (t < end)
        return covered

    def _conditions(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        when = item.get("when") or self.field.get("when")
        if when is None or when == "always":
            return []
        found: list[dict[str, Any]] = when if isinstance(when, list) else when.get("any", [when])
        return found

    def _holds(self, item: dict[str, Any]) -> Tensor:
        conditions = self._conditions(item)
        if not conditions:
            return torch.ones(len(self.ids), dtype=torch.bool)
        each = torch.stack([self._holds_one(condition) for condition in conditions])
        when = item.get("when") or self.field["when"]
        one_is_enough = isinstance(when, dict) and "any" in when
        return each.any(0) if one_is_enough else each.all(0)

    def _holds_one(self, condition: dict[str, Any]) -> Tensor:
        scope, below = condition.get("scope", "token"), "below" in condition
        if scope == "prompt":
            fires = (self.prompt or self)._fires(condition)[0][: self.prompt_len].any()
            return (fires ^ below).expand(len(self.ids))
        fires, counts = self._fires(condition)
        if scope == "so_far":
            return (fires.long().cumsum(0) > 0) ^ below
        return counts & ~fires if below else fires

    def _fires(self, condition: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Where a condition's feature exceeds its bound, and where it counts at all."""
        name = condition["sae"]
        if name not in self.seen:  # read later than this pass has come: only of the prompt
            assert condition.get("scope") == "prompt"
            nowhere = torch.zeros(len(self.ids), dtype=torch.bool)
            return nowhere, nowhere
        sae, x, feature = self.saes[name], self.seen[name], condition["feature"]
        bound = condition["below"] if "below" in condition else condition["above"]
        if condition.get("unit") == "max_act":
            bound = float(np.float32(bound * sae.max_activation[feature]))
        counts = self.ordinary & ~self._sinks(name)
        if counts.any():
            self._near(sae.distance_to_bound(x[counts], feature, bound))
        return counts & (sae.encode(x)[:, feature] > bound), counts

    def _sinks(self, name: str) -> Tensor:
        most = self.saes[name].sink_norm
        x = self.seen[name]
        sinks: Tensor = x.norm(dim=-1) > (torch.inf if most is None else most)
        return sinks

    def _near(self, distance: Tensor) -> None:
        self.nearest = min(self.nearest, float(distance.min()))


def _applied(item: dict[str, Any], so_far: Tensor, old: Tensor) -> Tensor:
    v = item.get("value", 0.0)
    made: dict[str, Tensor] = {
        "clamp": torch.full_like(old, v),
        "ablate": torch.zeros_like(old),
        "scale": v * old,
        "add": so_far + v,
        "floor": old.clamp(min=v),
        "cap": old.clamp(max=v),
    }
    return made[item["op"]]
