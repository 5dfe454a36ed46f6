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
from ..device.feeds import Array, Arrays, as_tuple, count, mapped
from ..device.golden import Golden, read_golden
from ..device.manifest import Manifest, ModelFile
from ..device.parity import Limits, Parity, compare, failures, relative_difference
from ..errors import CompressorError, GateError, HostError
from ..hosts.carrying import DeviceSide, store
from .cargo import Cargo
from .preflight import printed
from .reports import Content, Latency

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

    checks: tuple[Content, ...]
    compared: tuple[Content, ...]
    not_compared: tuple[str, ...]
    latency: tuple[Latency, ...]
    not_timed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Check:
    """A check of the device's own; `parity` with the golden outputs, as it measured it, of a model that ran."""

    subject: str
    outcome: str
    detail: str
    parity: Parity | None

    def to_json(self) -> Content:
        row: dict[str, object] = {"what": self.subject, "outcome": self.outcome, "detail": self.detail}
        if self.parity is not None:
            row["parity"] = _figures(self.parity)
        return row


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a model answered there, [N, ...] for either set of inputs."""

    model: ModelFile
    to_golden: Arrays
    to_fresh: Arrays


def _figures(parity: Parity) -> Content:
    """In plain values; of channels only where the outputs' are of different units."""
    figures = asdict(parity)
    if parity.channel_relative is None:
        del figures["channel_relative"], figures["channel"]
    return figures


def accept(side: DeviceSide, cargo: Cargo, folder: str, *, key: bytes, timing: Timing, say: Say) -> Acceptance:
    """Tries the release in a folder of the device; raises GateError where it must not be used, HostError else."""
    say("verifying there")
    checks = _verify(side, cargo, folder, key)
    say("comparing answers")
    compared, not_compared = _compare(side, cargo, folder)
    say("timing there")
    latency, not_timed = _time(side, cargo, folder, timing)
    return Acceptance(tuple(checks), tuple(compared), tuple(not_compared), tuple(latency), not_timed)


def _verify(side: DeviceSide, cargo: Cargo, folder: str, key: bytes) -> list[Content]:
    """The device's own verification, its figures held to the manifest's limits once more."""
    words = ["verify", folder, "--json"]
    if key:
        words += ["--key", store(side.session, "key.pem", key)]
    content = _said(side, words, timeout_s=_VERIFY_S)
    try:
        entries = [fields.as_object(entry, "a check") for entry in fields.entries(content, "checks")]
        passed = fields.flag(content, "passed")
        checks = [_read_check(entry) for entry in entries]
    except ValueError as error:
        raise HostError(f"{_name(side)} answers with what is no verification: {error}") from error
    _require_limits(side, cargo.manifest, checks)
    if not passed:
        raise GateError(f"{_name(side)}: the bundle did not pass its verification there")
    return [check.to_json() for check in checks]


def _read_check(entry: fields.Object) -> _Check:
    parity = entry.get("parity")
    return _Check(
        subject=printed(entry, "what"),
        outcome=printed(entry, "outcome"),
        detail=printed(entry, "detail"),
        parity=None if parity is None else _read_parity(fields.as_object(parity, "a parity")),
    )


def _read_parity(content: fields.Object) -> Parity:
    figures: dict[str, Any] = {key: fields.number(content, key, least=-math.inf, most=math.inf) for key in _FIGURES}
    if content.get("channel_relative") is not None:  # of outputs whose channels are of different units
        figures["channel_relative"] = fields.number(content, "channel_relative", least=0, most=math.inf)
        figures["channel"] = printed(content, "channel")
    return Parity(**figures)


def _require_limits(side: DeviceSide, manifest: Manifest, checks: Sequence[_Check]) -> None:
    """Raises GateError where a model is beyond the manifest's limits by the device's figures, or none ran."""
    limits = {model.path: model.limits for model in manifest.models}
    ran = False
    for check in checks:
        if check.parity is None or check.subject not in limits:
            continue
        ran = True
        broken = failures(check.parity, limits[check.subject])
        if broken:
            raise GateError(f"{_name(side)}: {check.subject} fails its golden outputs there: {'; '.join(broken)}")
    if not ran:
        raise GateError(f"{_name(side)}: none of the bundle's models ran there, so nothing was verified")


def _compare(side: DeviceSide, cargo: Cargo, folder: str) -> tuple[list[Content], list[str]]:
    """The device's answers beside the golden ones, and on fresh inputs beside ours; what was not compared, and why."""
    golden = read_golden(cargo.folder, cargo.manifest)
    models = _comparable(cargo.manifest, golden)
    if not models:
        return [], ["answers: they are too long to be fetched"]

    fresh_inputs = _mixed(golden.inputs)
    answers = _ask_answers(side, folder, models, golden.inputs, fresh_inputs)
    rows = [
        _row(side, answer.model, "golden outputs", golden.outputs, answer.to_golden, answer.model.limits)
        for answer in answers
    ]
    fresh_rows, not_compared = _compare_fresh(side, cargo, answers, fresh_inputs)
    ran = {answer.model.path for answer in answers}
    absent = [f"{model.path}: it does not run there" for model in models if model.path not in ran]
    return rows + fresh_rows, not_compared + absent


def _compare_fresh(
    side: DeviceSide, cargo: Cargo, answers: Sequence[_Answer], inputs: Arrays
) -> tuple[list[Content], list[str]]:
    """fp32 files alone: what others compute differs between processors, and their limits are of golden inputs."""
    fp32 = [answer for answer in answers if answer.model.precision == "fp32"]
    try:
        answers_here = answer_all(cargo.folder, [answer.model for answer in fp32], [inputs])
    except CompressorError as error:
        return [], [f"fresh inputs: {error}"]
    if not answers_here:
        return [], ["fresh inputs: no fp32 model runs both here and there"]

    rows = []
    for place, (reference,) in answers_here.items():
        model = fp32[place].model
        limits = replace(model.limits, top1_agreement=0.0, channel=None)  # of a mixture two classes may be as likely
        rows.append(_row(side, model, "answers here to fresh inputs", reference, fp32[place].to_fresh, limits))
    return rows, []


def _row(
    side: DeviceSide, model: ModelFile, against: str, reference: Arrays, answer: Arrays, limits: Limits
) -> Content:
    """A comparison as JSON; raises GateError for one outside the model's limits."""
    parity = compare(reference, answer)
    broken = failures(parity, limits)
    if broken:
        raise GateError(f"{_name(side)}: {model.path} answers there unlike the {against}: {'; '.join(broken)}")
    share = relative_difference(parity)
    return {"model": model.path, "against": against, "relative": share, **asdict(parity)}


def _comparable(manifest: Manifest, golden: Golden) -> list[ModelFile]:
    """Models in their order while their answers to both sets can be fetched."""
    output_bytes = sum(array.nbytes for array in as_tuple(golden.outputs))
    most = _MOST_FETCHED // (2 * max(1, output_bytes) + 4096)  # 4096: headers of the arrays
    return [model for model in manifest.models if not model.made_for and not model.library][:most]


def _mixed(inputs: Arrays) -> Arrays:
    """As many samples, drawn now: mixtures of two for floats, whole ones in another order for the rest."""
    generator = np.random.default_rng(secrets.randbits(64))
    first, second = generator.permutation(count(inputs)), generator.permutation(count(inputs))
    share = generator.uniform(0.2, 0.8)

    def mix(array: Array) -> Array:
        if array.dtype.kind != "f":
            return array[first]
        mixture: Array = share * array[first] + (1 - share) * array[second]
        return mixture.astype(array.dtype)

    return mapped(mix, inputs)


def _ask_answers(
    side: DeviceSide, folder: str, models: Sequence[ModelFile], golden_inputs: Arrays, fresh_inputs: Arrays
) -> list[_Answer]:
    """Of the models that run there, in their order."""
    inputs = store(side.session, "challenge.npz", _archive(pack([golden_inputs, fresh_inputs])))
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

    answers = []
    for index, model in enumerate(models):
        if model.path not in ran:
            continue
        sets = unpack(arrays, f"{index}.")
        if len(sets) != 2:
            raise HostError(f"{_name(side)} did not answer all that it was asked")
        answers.append(_Answer(model, *sets))
    return answers


def _archive(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    write_npz(buffer, arrays)  # type: ignore[arg-type]  # zipfile takes either
    return buffer.getvalue()


def _time(side: DeviceSide, cargo: Cargo, folder: str, timing: Timing) -> tuple[list[Latency], dict[str, str]]:
    """A row for each model that was timed there, and why the others were not."""
    flags = ("--seconds", f"{timing.seconds:g}", "--runs", str(timing.runs), "--rounds", str(timing.rounds))
    timeout_s = len(cargo.manifest.models) * (10 * timing.seconds + _WAIT_S)
    content = _said(side, ["benchmark", folder, "--json", *flags], timeout_s=timeout_s)
    try:
        entries = fields.entries(content, "timings", most=_MOST_ROWS)
        rows = [_read_latency(fields.as_object(entry, "a timing")) for entry in entries]
        reasons = fields.inner(content, "not_run")
        not_timed = {fields.printable(path): fields.text(reasons, path) for path in reasons}
    except ValueError as error:
        raise HostError(f"{_name(side)} answers with what are no timings: {error}") from error
    return rows, not_timed


def _read_latency(entry: fields.Object) -> Latency:
    def figure(key: str) -> float:
        return fields.number(entry, key, least=-1, most=1e15)

    return {
        "model": printed(entry, "model"),
        "runtime": printed(entry, "runtime"),
        "p90": printed(entry, "p90"),
        "p99": printed(entry, "p99"),
        "p50_ms": figure("p50_ms"),
        "mean_ms": figure("mean_ms"),
        "max_ms": figure("max_ms"),
        "images_per_s": figure("images_per_s"),
        "load_ms": figure("load_ms"),
        "first_run_ms": figure("first_run_ms"),
        "peak_bytes": figure("peak_bytes"),
        "n": fields.whole(entry, "n", least=1),
    }


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
    lines = out.strip().splitlines() or ["null"]
    return fields.as_object(json.loads(lines[-1]), "its last line")


def _error(side: DeviceSide, code: int, err: str) -> CompressorError:
    """What failed there, as it was said there: a gate that does not hold, or a device that can't."""
    lines = err.strip().splitlines() or [f"it ended with code {code}"]
    reason = fields.printable(lines[-1].removeprefix("error: "))[:400]
    kind = GateError if code == _GATE else HostError
    return kind(f"{_name(side)}: {reason}")


def _name(side: DeviceSide) -> str:
    return side.session.device.name
