"""A supervisor knows how each engine stands: soon while it works, exactly once it rests."""

import dataclasses

import msgspec

from cortex.ipc.messages import Cancel, ClearPrefixCache, EngineReport, UnloadModel
from cortex.runtime.device.engine_reports import EngineReports
from engine_fakes import DeviceBench, FakeLoad, FakeModel, greedy
from supervisor_fakes import FakeClock


@dataclasses.dataclass
class FakeEngine:
    """An engine that stands as the test says."""

    report: EngineReport
    has_work: bool = True

    @property
    def model(self) -> str:
        return self.report.model

    def standing(self) -> EngineReport:
        return self.report

    def changes(self, **fields: int) -> EngineReport:
        self.report = msgspec.structs.replace(self.report, **fields)
        return self.report


class Bench:
    """Reports of engines that were just loaded."""

    def __init__(self, *engines: FakeEngine) -> None:
        self.clock = FakeClock()
        self.sent: list[EngineReport] = []
        self.reports = EngineReports(self.sent.append, self.clock)
        for engine in engines:
            self.reports.begin(engine)


def engine(model: str = "m") -> FakeEngine:
    return FakeEngine(EngineReport(model, 0, 0, 64, 0, 0, 0))


def test_of_a_model_that_was_just_loaded_nothing_is_said() -> None:
    idle = engine()
    bench = Bench(idle)
    idle.has_work = False

    bench.reports.tell(idle)

    assert bench.sent == []


def test_what_has_changed_is_told_ten_times_a_second() -> None:
    busy = engine()
    bench = Bench(busy)
    for free in range(63, 3, -1):  # 60 steps of 10 ms
        busy.changes(kv_free_tokens=free)
        bench.reports.tell(busy)
        bench.clock.now += 0.01

    assert 6 <= len(bench.sent) <= 7


def test_rest_is_told_at_once_and_once() -> None:
    busy = engine()
    bench = Bench(busy)
    bench.reports.tell(busy)
    first = busy.changes(running=1)
    bench.reports.tell(busy)
    busy.has_work = False
    last = busy.changes(running=0)

    for _ in range(3):
        bench.reports.tell(busy)

    assert bench.sent == [first, last]


def test_models_are_told_of_one_by_one() -> None:
    a, b = engine("a"), engine("b")
    bench = Bench(a, b)
    of_a, of_b = a.changes(running=1), b.changes(running=2)

    bench.reports.tell(a)
    bench.reports.tell(b)
    bench.reports.end("a")
    bench.reports.begin(engine("a"))

    assert bench.sent == [of_a, of_b]


def device() -> DeviceBench:
    bench = DeviceBench(FakeLoad(m=FakeModel()))
    bench.load("m", max_sequences=2, kv_cache_bytes=8 * 16 * 40)
    return bench


def test_a_device_at_rest_has_told_that_all_of_its_cache_is_free() -> None:
    bench = device()
    bench.generate(1, [1] * 100, greedy(40))
    bench.generate(2, [2] * 40, greedy(40))
    bench.generate(3, [3] * 40, greedy(40))
    bench.run_until_ended(1, 2, 3)
    bench.close()

    last = bench.channel.reports[-1]
    assert (last.running, last.waiting, last.kv_free_tokens) == (0, 0, 640)
    assert any(report.kv_free_tokens < 640 for report in bench.channel.reports)
    assert any(report.running == 2 and report.waiting == 1 for report in bench.channel.reports)


def test_what_a_cancelled_sequence_gave_back_is_told_without_another_step() -> None:
    bench = device()
    bench.generate(1, [1] * 100, greedy(400))
    bench.run_until(lambda: bool(bench.channel.reports))
    bench.send(Cancel(bench.command_id(), 1))
    bench.run_until(lambda: not bench.channel.reports[-1].running)
    bench.close()

    assert bench.channel.reports[-1].kv_free_tokens == 640


def test_a_model_that_is_loaded_again_is_told_of_again() -> None:
    bench = device()
    bench.generate(1, [1] * 100, greedy(4))
    bench.run_until_ended(1)
    bench.ask(ClearPrefixCache(bench.command_id(), "m"))
    bench.ask(UnloadModel(bench.command_id(), "m"))
    bench.load("m", max_sequences=2, kv_cache_bytes=8 * 16 * 40)
    before = len(bench.channel.reports)
    bench.generate(2, [1] * 100, greedy(4))
    bench.run_until_ended(2)
    bench.close()

    assert len(bench.channel.reports) > before
