"""A release on a device in, whether it may be switched to out: verified there, compared here, timed there.

What a device says of itself is not all that is believed: answers to the golden inputs, and to inputs that nobody saw
before, come back and are compared here. A device that computes rightly now and serves something else afterwards can't
be told from here.
"""

from __future__ import annotations

import io
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..device import fields
from ..device.arrays import read_npz, write_npz
from ..device.challenge import answer_all, pack, unpack
from ..device.feeds import Arrays, count, mapped
from ..device.golden import Golden, read_golden
from ..device.manifest import Manifest, ModelFile
from ..device.parity import Limits, Parity, compare, failures, relative_difference
from ..errors import CompressorError, GateError, HostError
from ..hosts.carrying import DeviceSide, store
from .cargo import Cargo

Say = Callable[[str], None]
_MOST_FETCHED = 1 << 24  # bytes of answers that come back
_MOST_ROWS = 1000
_VERIFY_S, _CHALLENGE_S = 600.0, 600.0
_WAIT_S = 120.0  # beyond the time that runs are given
_GATE = GateError.exit_code
_FIGURES = ("n", "max_abs", "mean_abs", "cosine", "sqnr_db", "top1_agreement", "reference_max_abs")


@dataclass(frozen=True, slots=True)
class Timing:
    """How long every model is timed there: seconds, and runs at least."""

    seconds: float = 2.0
    runs: int = 64
    rounds: int = 5


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`checks` as the device saw them, `compared` as we did, `latency` rows of milliseconds; all plain for JSON."""

    checks: tuple[Mapping[str, Any], ...]
    compared: tuple[Mapping[str, Any], ...]
    not_compared: tuple[str, ...]
    latency: tuple[Mapping[str, Any], ...]
    not_timed: Mapping[str, str]


def accept(side: DeviceSide, cargo: Cargo, folder: str, *, key: bytes, timing: Timing, say: Say) -> Acceptance:
    """Tries the release in a folder of the device; raises GateError where it must not be used, HostError else."""
    say("verifying there")
    checks = _verify(side, cargo, folder, key)
    say("comparing answers")
    compared, not_compared = _compare(side, cargo, folder)
    say("timing there")
    latency, not_timed = _time(side, cargo, folder, timing)
    return Acceptance(tuple(checks), tuple(compared), tuple(not_compared), tuple(latency), not_timed)


def _verify(side: DeviceSide, cargo: Cargo, folder: str, key: bytes) -> list[dict[str, Any]]:
    """The device's own verification, its figures held to the manifest's limits once more."""
    words = ["verify", folder, "--json"]
    if key:
        words += ["--key", store(side.session, "key.pem", key)]
    content = _said(side, words, timeout_s=_VERIFY_S)
    try:
        checks = [fields.as_object(entry, "a check") for entry in fields.entries(content, "checks")]
        passed = fields.flag(content, "passed")
        rows = [_check(check) for check in checks]
    except ValueError as error:
        raise HostError(f"{_name(side)} answers with what is no verification: {error}") from error
    _require_held(side, cargo.manifest, rows)
    if not passed:
        raise GateError(f"{_name(side)}: the bundle did not pass its verification there")
    return rows


def _check(check: fields.Object) -> dict[str, Any]:
    words = {key: fields.printable(fields.text(check, key)) for key in ("what", "outcome", "detail")}
    parity = check.get("parity")
    if parity is None:
        return words
    content = fields.as_object(parity, "a parity")
    figures: dict[str, Any] = {key: fields.number(content, key, least=-math.inf, most=math.inf) for key in _FIGURES}
    if content.get("channel_relative") is not None:  # of outputs whose channels are of different units
        figures["channel_relative"] = fields.number(content, "channel_relative", least=0, most=math.inf)
        figures["channel"] = fields.printable(fields.text(content, "channel"))
    return {**words, "parity": figures}


def _require_held(side: DeviceSide, manifest: Manifest, rows: Sequence[Mapping[str, Any]]) -> None:
    limits = {model.path: model.limits for model in manifest.models}
    ran = [row for row in rows if "parity" in row and row["what"] in limits]
    for row in ran:
        broken = failures(Parity(**row["parity"]), limits[row["what"]])
        if broken:
            raise GateError(f"{_name(side)}: {row['what']} fails its golden outputs there: {'; '.join(broken)}")
    if not ran:
        raise GateError(f"{_name(side)}: none of the bundle's models ran there, so nothing was verified")


def _compare(side: DeviceSide, cargo: Cargo, folder: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The device's answers beside the golden ones, and on fresh inputs beside ours."""
    golden = read_golden(cargo.folder, cargo.manifest)
    models = _comparable(cargo.manifest, golden)
    if not models:
        return [], ["answers: they are too long to be fetched"]
    sets = [golden.inputs, _mixed(golden.inputs)]
    answers = _answers(side, folder, models, sets)
    rows: list[dict[str, Any]] = []
    for index, answered in answers.items():
        rows.append(_row(side, models[index], "golden outputs", golden.outputs, answered[0], models[index].limits))
    fresh, not_compared = _compare_fresh(side, cargo, models, sets[1], answers)
    absent = [f"{model.path}: it does not run there" for index, model in enumerate(models) if index not in answers]
    return rows + fresh, not_compared + absent


def _compare_fresh(
    side: DeviceSide, cargo: Cargo, models: Sequence[ModelFile], inputs: Arrays, answers: Mapping[int, list[Arrays]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """fp32 files alone: what others compute differs between processors, and their limits are of golden inputs."""
    chosen = {index: models[index] for index in answers if models[index].precision == "fp32"}
    try:
        ours = answer_all(cargo.folder, list(chosen.values()), [inputs])
    except CompressorError as error:
        return [], [f"fresh inputs: {error}"]
    if not ours:
        return [], ["fresh inputs: no fp32 model runs both here and there"]
    rows = []
    for place, (index, model) in enumerate(chosen.items()):
        if place in ours:
            limits = replace(
                model.limits, top1_agreement=0.0, channel=None
            )  # of a mixture two classes may be as likely
            rows.append(_row(side, model, "answers here to fresh inputs", ours[place][0], answers[index][1], limits))
    return rows, []


def _row(
    side: DeviceSide, model: ModelFile, against: str, reference: Arrays, answer: Arrays, limits: Limits
) -> dict[str, Any]:
    """A comparison as JSON; raises GateError for one outside the model's limits."""
    parity = compare(reference, answer)
    broken = failures(parity, limits)
    if broken:
        raise GateError(f"{_name(side)}: {model.path} answers there unlike the {against}: {'; '.join(broken)}")
    share = relative_difference(parity)
    return {"model": model.path, "against": against, "relative": share, **asdict(parity)}


def _comparable(manifest: Manifest, golden: Golden) -> list[ModelFile]:
    """Models in their order while their answers to both sets can be fetched."""
    sizes = [array.nbytes for array in (golden.outputs if isinstance(golden.outputs, tuple) else (golden.outputs,))]
    most = _MOST_FETCHED // (2 * max(1, sum(sizes)) + 4096)
    return [model for model in manifest.models if not model.made_for and not model.library][:most]


def _mixed(inputs: Arrays) -> Arrays:
    """As many samples, drawn now: mixtures of two for floats, whole ones in another order for the rest."""
    generator = np.random.default_rng(secrets.randbits(64))
    first, second = generator.permutation(count(inputs)), generator.permutation(count(inputs))
    share = generator.uniform(0.2, 0.8)

    def mix(array: Any) -> Any:
        if array.dtype.kind != "f":
            return array[first]
        return (share * array[first] + (1 - share) * array[second]).astype(array.dtype)

    return mapped(mix, inputs)


def _answers(
    side: DeviceSide, folder: str, models: Sequence[ModelFile], sets: Sequence[Arrays]
) -> dict[int, list[Arrays]]:
    inputs = store(side.session, "challenge.npz", _archive(pack(sets)))
    outputs = str(Path(inputs).with_name("answers.npz"))
    paths = [model.path for model in models]
    module = "compressor.device.challenge"
    code, out, err = side.run(module, folder, inputs, outputs, *paths, timeout_s=_CHALLENGE_S)
    if code:
        raise _error(side, code, err)
    content = side.session.ask("fetch", name="answers.npz", most=_MOST_FETCHED)["payload"]
    try:
        ran = fields.texts(_last_object(out), "ran")
        arrays = read_npz(io.BytesIO(content), lambda names: names, most_bytes=_MOST_FETCHED)
    except ValueError as error:
        raise HostError(f"{_name(side)} answers with what are no answers: {error}") from error
    places = [index for index, path in enumerate(paths) if path in ran]
    answers = {index: unpack(arrays, f"{index}.") for index in places}
    if any(len(answered) != len(sets) for answered in answers.values()):
        raise HostError(f"{_name(side)} did not answer all that it was asked")
    return answers


def _archive(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    write_npz(buffer, arrays)  # type: ignore[arg-type]  # zipfile takes either
    return buffer.getvalue()


def _time(side: DeviceSide, cargo: Cargo, folder: str, timing: Timing) -> tuple[list[dict[str, Any]], dict[str, str]]:
    flags = ("--seconds", f"{timing.seconds:g}", "--runs", str(timing.runs), "--rounds", str(timing.rounds))
    timeout_s = len(cargo.manifest.models) * (10 * timing.seconds + _WAIT_S)
    content = _said(side, ["benchmark", folder, "--json", *flags], timeout_s=timeout_s)
    try:
        entries = fields.entries(content, "timings", most=_MOST_ROWS)
        rows = [_timed(fields.as_object(entry, "a timing")) for entry in entries]
        reasons = fields.inner(content, "not_run")
        not_timed = {fields.printable(path): fields.text(reasons, path) for path in reasons}
    except ValueError as error:
        raise HostError(f"{_name(side)} answers with what are no timings: {error}") from error
    return rows, not_timed


def _timed(entry: fields.Object) -> dict[str, Any]:
    """The figures that are told: milliseconds, and how many runs they are of."""
    row: dict[str, Any] = {key: fields.printable(fields.text(entry, key)) for key in ("model", "runtime", "p90", "p99")}
    for key in ("p50_ms", "mean_ms", "max_ms", "images_per_s", "load_ms", "first_run_ms", "peak_bytes"):
        row[key] = fields.number(entry, key, least=-1, most=1e15)
    return {**row, "n": fields.whole(entry, "n", least=1)}


def _said(side: DeviceSide, words: Sequence[str], *, timeout_s: float) -> fields.Object:
    """The JSON object that a verb prints there, also where it fails with a reason of its own."""
    code, out, err = side.run("compressor.device", *words, timeout_s=timeout_s)
    if code:
        raise _error(side, code, err)
    try:
        return _last_object(out)
    except ValueError as error:
        raise HostError(f"{_name(side)} answers `{words[0]}` with what is no JSON: {error}") from error


def _last_object(out: str) -> fields.Object:
    lines = out.strip().splitlines()
    return fields.as_object(json.loads(lines[-1]) if lines else None, "its last line")


def _error(side: DeviceSide, code: int, err: str) -> CompressorError:
    """What failed there, as it was said there: a gate that does not hold, or a device that can't."""
    lines = [line for line in err.strip().splitlines() if line.strip()]
    reason = fields.printable(lines[-1].removeprefix("error: "))[:400] if lines else f"it ended with code {code}"
    message = f"{_name(side)}: {reason}"
    return GateError(message) if code == _GATE else HostError(message)


def _name(side: DeviceSide) -> str:
    return side.session.device.name
