"""The programs that the rig drives: how each writes and rotates, and what the outcome may be."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

WRITERS = Path(__file__).resolve().parent / "writers"
JARS = Path("/usr/share/java")
MOST = 24_000  # bytes of a file that rotates by its size: about a second's lines


@dataclass
class Place:
    """Where one run happens."""

    folder: Path  # the log's folder lies in it, and what no viewer sees
    log: Path
    tools: Path  # what pip, npm and javac brought
    rotations: int = 0
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def logs(self) -> Path:
        return self.log.parent

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


Command = list[str | Path]


@dataclass
class SetUp:
    """One program, or a writer and the program that rotates its log."""

    name: str
    writer: Callable[[Place], Command]
    rotate: Callable[[Place], object] | None = None  # about once a second
    needs: tuple[str, ...] = ()  # programs, jars, modules
    listed: bool = True  # names, formats and times of change say without doubt what came when
    renames: bool = True  # else a rotation leads elsewhere, turns a link, or packs at once by zstd
    keeps: bool = True  # else lines may go from the disk before anybody could read them
    cuts: bool = False  # copytruncate: what comes between copy and cut is gone
    followed: bool = True  # else it cannot be, and only what happens is shown
    writers: int = 1
    log: str = "logs/AUDIT.log"
    prepare: Callable[[Place], object] | None = None


SETUPS: dict[str, SetUp] = {}
AWAY = {"listed": False, "renames": False}


def add(name: str, writer: Callable[[Place], Command], **more: object) -> None:
    SETUPS[name] = SetUp(name, writer, **more)  # type: ignore[arg-type]


def have(setup: SetUp, tools: Path) -> str:
    """What of a set-up's needs is not there."""
    places = [tools / "pip", tools / "npm/node_modules", tools / "java", JARS]
    found = [
        need
        for need in setup.needs
        if shutil.which(need) or any((place / need).exists() for place in places)
    ]
    return ", ".join(need for need in setup.needs if need not in found)


def call(command: Command | str, place: Place) -> None:
    """What it has to say is kept, for whoever looks into a run."""
    with open(place.folder / "rotations", "ab") as output:
        subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=place.logs,
            stdout=output,
            stderr=output,
            timeout=20,
        )


def sent_again(place: Place) -> str:
    return f"kill -USR1 $(cat {place.log}.pid)"


def python(how: str) -> Callable[[Place], Command]:
    return lambda place: [sys.executable, WRITERS / "writer.py", how, place.log]


def node(how: str) -> Callable[[Place], Command]:
    return lambda place: [
        "node",
        WRITERS / "writer.cjs",
        how,
        place.log,
        place.tools / "npm/node_modules",
    ]


def shell(text: str, reopen: bool = True) -> Callable[[Place], None]:
    """A rotation by hand ({number} counts them), then the writer opens its file again."""

    def rotate(place: Place) -> None:
        place.rotations += 1
        script = text.format(log=place.log, number=place.rotations, base=place.log.with_suffix(""))
        call(script + (f"\n{sent_again(place)}" if reopen else ""), place)

    return rotate


# logrotate


Clock = Callable[[int], str]  # what libfaketime is told at which rotation


def logrotate(options: str, how: str, clock: Clock | None, force: bool) -> Callable[[Place], None]:

    def rotate(place: Place) -> None:
        place.rotations += 1
        (place.folder / "old").mkdir(exist_ok=True)
        ending = f"postrotate\n{sent_again(place)}\nendscript" if how == "signal" else ""
        text = (
            f"{place.log} {{\nmissingok\n{options.format(old=place.folder / 'old')}\n{ending}\n}}\n"
        )
        config = place.file("logrotate.conf", text)
        config.chmod(0o644)
        command: Command = [
            "logrotate",
            *(["-f"] if force else []),
            "-s",
            place.folder / "state",
            config,
        ]
        if clock:
            command = ["env", "NO_FAKE_STAT=1", "faketime", "-f", clock(place.rotations), *command]
        call(command, place)

    return rotate


def add_logrotate(
    name: str, options: str, how: str = "signal", clock: Clock | None = None, **more: object
) -> None:
    if "rotate" not in options.split():
        options = f"rotate 30\n{options}"
    needs = ("logrotate", "faketime") if clock else ("logrotate",)
    force = "size" not in options.split()
    add(
        f"logrotate-{name}",
        python(how),
        rotate=logrotate(options, how, clock, force),
        needs=needs,
        **more,
    )


XZ = "compress\ncompresscmd /usr/bin/xz\nuncompresscmd /usr/bin/unxz\ncompressext .xz"
ZSTD = "compress\ncompresscmd /usr/bin/zstd\ncompressoptions -q --rm\ncompressext .zst"
BZIP2 = "compress\ncompresscmd /usr/bin/bzip2\nuncompresscmd /usr/bin/bunzip2\ncompressext .bz2"


def next_day(number: int) -> str:
    return f"+{number}d"


def next_hour(number: int) -> str:
    return f"+{number}h"


def hour_back(number: int) -> str:
    return "-1h" if number % 3 == 0 else "+0h"


def month_end(number: int) -> str:
    day = ("10-29", "10-30", "10-31", "11-01", "11-02", "11-03")[min(number - 1, 5)]
    return f"@2026-{day} 12:00:00"


add_logrotate("create", "create")
add_logrotate("create-rotate-2", "create\nrotate 2", keeps=False)
add_logrotate("rotate-0", "create\nrotate 0", keeps=False)
add_logrotate("size", "create\nsize 10k")
add_logrotate("su-sharedscripts", "create\nsu root root\nsharedscripts")
add_logrotate("nocreate", "nocreate")
add_logrotate("nocreate-open-each", "nocreate", how="each")
add_logrotate("start-0", "create\nstart 0")
add_logrotate("compress", "create\ncompress")
add_logrotate("compress-delaycompress", "create\ncompress\ndelaycompress")
add_logrotate("start-0-delaycompress", "create\nstart 0\ncompress\ndelaycompress")
add_logrotate("xz", f"create\n{XZ}")
add_logrotate("xz-delaycompress", f"create\n{XZ}\ndelaycompress")
add_logrotate("bzip2", f"create\n{BZIP2}")
add_logrotate("zstd", f"create\n{ZSTD}", **AWAY)
add_logrotate("dateext", "create\ndateext", clock=next_day)
add_logrotate("dateext-hours", "create\ndateext\ndateformat -%Y%m%d%H", clock=next_hour)
add_logrotate("dateext-seconds", "create\ndateext\ndateformat -%Y%m%d-%H%M%S")
add_logrotate("dateext-epoch", "create\ndateext\ndateformat -%s")
add_logrotate("dateext-dot-epoch", "create\ndateext\ndateformat .%s")
add_logrotate(
    "dateext-compress", "create\ndateext\ndateformat -%Y%m%d-%H%M%S\ncompress\ndelaycompress"
)
add_logrotate(
    "dateext-clock-back",
    "create\ndateext\ndateformat -%Y%m%d-%H%M%S",
    clock=hour_back,
    listed=False,
)
add_logrotate(
    "dateext-day-first", "create\ndateext\ndateformat -%d%m%Y", clock=month_end, listed=False
)
add_logrotate("dateext-underscore", "create\ndateext\ndateformat _%Y%m%d-%H%M%S", listed=False)
add_logrotate("olddir", "create\nolddir {old}", **AWAY)
add_logrotate("renamecopy-olddir", "create\nrenamecopy\nolddir {old}", **AWAY)
add_logrotate("extension", "create\nextension .log")
add_logrotate("extension-dates", "create\nextension .log\ndateext\ndateformat -%Y%m%d-%H%M%S")
add_logrotate("addextension", "create\naddextension .old", listed=False)
add_logrotate("copytruncate", "copytruncate", how="never", cuts=True)
add_logrotate(
    "copytruncate-dateext", "copytruncate\ndateext\ndateformat -%s", how="never", cuts=True
)
add_logrotate("copytruncate-compress", "copytruncate\ncompress", how="never", cuts=True)
add_logrotate("copytruncate-own-offset", "copytruncate", how="offset", cuts=True)
add_logrotate("copytruncate-xz", f"copytruncate\n{XZ}", how="never", cuts=True)
add_logrotate("copytruncate-olddir", "copytruncate\nolddir {old}", how="never", cuts=True, **AWAY)
add_logrotate("copytruncate-extension", "copytruncate\nextension .log", how="never", cuts=True)
add_logrotate("copy", "copy", how="never")
add_logrotate("never-reopened", "create", how="never")

# other programs that rename, and the order in which they do it

SHIFT = "for n in $(seq 40 -1 {first}); do for e in '' .gz .bz2; do "
SHIFT += "[ -e {{log}}.$n$e ] && mv {{log}}.$n$e {{log}}.$((n+1))$e; done; done"
NEWSYSLOG = SHIFT.format(first=0) + "\nmv {log} {log}.0 && : > {log}"
KUBELET = "for f in {log}.*[0-9]; do "
KUBELET += "[ -e $f ] && {{ gzip -c $f > $f.tmp && mv $f.tmp $f.gz && rm $f; }}; done\n"
KUBELET += "mv {log} {log}.$(date +%Y%m%d-%H%M%S)"
LUMBERJACK = "mv {log} {base}-$(date +%Y-%m-%dT%H-%M-%S).$(date +%N | cut -c1-3).log"


def newsyslog(program: str) -> Callable[[Place], None]:
    """The daemon is told, then the file is packed."""
    renamed = shell(NEWSYSLOG)

    def rotate(place: Place) -> None:
        renamed(place)
        call(f"sleep 0.05; {program} {place.log}.0", place)

    return rotate


def savelog(options: str) -> Callable[[Place], None]:
    return shell("savelog " + options + " {log}")


def linked(place: Place) -> None:
    target = place.folder / "pods" / "0.log"
    target.parent.mkdir()
    place.log.symlink_to(target)


def kubelet_linked(place: Place) -> None:
    target = place.log.resolve()
    call(KUBELET.format(log=target), place)
    call(sent_again(place), place)


add("savelog", python("signal"), rotate=savelog("-q -n -c 30"), needs=("savelog",))
add("savelog-dates", python("signal"), rotate=savelog("-q -n -d -l -c 30"), needs=("savelog",))
add("newsyslog-gz", python("signal"), rotate=newsyslog("gzip"))
add("newsyslog-bz2", python("signal"), rotate=newsyslog("bzip2"), needs=("bzip2",))
add("kubelet", python("signal"), rotate=shell(KUBELET))
add("kubelet-link", python("signal"), rotate=kubelet_linked, prepare=linked)
add("lumberjack-order", python("signal"), rotate=shell(LUMBERJACK))
add(
    "lumberjack-order-gz",
    python("signal"),
    rotate=shell(LUMBERJACK + "\ngzip $(ls {base}-*.log | head -n -1)"),
)
add(
    "moved-elsewhere", python("signal"), rotate=shell("mv {log} {log}.{number}.aside"), listed=False
)
add(
    "watched-handler",
    python("watched"),
    rotate=shell(SHIFT.format(first=1) + "\nmv {log} {log}.1", False),
    writers=3,
)

# rsyslog by its own rotation


def rsyslog(place: Place) -> None:
    script = place.file(
        "rotate",
        f"#!/bin/sh\n{SHIFT.format(first=1).format(log=place.log)}\nmv {place.log} {place.log}.1\n",
    )
    script.chmod(0o755)
    config = place.file(
        "rsyslog.conf",
        f'module(load="imptcp")\ninput(type="imptcp" path="{place.log}.socket")\n'
        f'template(name="raw" type="string" string="%rawmsg%\\n")\n'
        f"$outchannel rotation,{place.log},{MOST},{script}\n*.* :omfile:$rotation;raw\n",
    )
    command = ["rsyslogd", "-n", "-f", str(config), "-i", str(place.folder / "pid")]
    with open(place.folder / "rsyslogd", "wb") as output:
        place.helpers.append(subprocess.Popen(command, stdout=output, stderr=output))


add("rsyslog-outchannel", python("socket"), prepare=rsyslog, needs=("rsyslogd",))

# programs that take the lines from a pipe


def piped(*command: str) -> Callable[[Place], Command]:
    return lambda place: [part.format(log=place.log, logs=place.logs) for part in command]


def config(name: str, text: str) -> Callable[[Place], None]:
    return lambda place: (place.logs / name).write_text(text) and None


DATE = "%Y%m%d-%H%M%S"
add("rotatelogs", piped("rotatelogs", "-L", "{log}", "{log}." + DATE, "1"), needs=("rotatelogs",))
add(
    "rotatelogs-local",
    piped("rotatelogs", "-l", "-L", "{log}", "{log}." + DATE, "1"),
    needs=("rotatelogs",),
)
add(
    "rotatelogs-size",
    piped("rotatelogs", "-L", "{log}", "{log}." + DATE, "24K"),
    needs=("rotatelogs",),
)
add(
    "rotatelogs-elsewhere",
    piped("rotatelogs", "-L", "{log}", "{logs}/old.%s", "1"),
    needs=("rotatelogs",),
    **AWAY,
)
add(
    "rotatelogs-truncates",
    piped("rotatelogs", "-t", "{log}", "1"),
    needs=("rotatelogs",),
    keeps=False,
    cuts=True,
    **AWAY,
)
add(
    "rotatelogs-ring",
    piped("rotatelogs", "-n", "4", "{log}", "1"),
    needs=("rotatelogs",),
    followed=False,
    keeps=False,
)
CRONOLOG = ("cronolog", "-S", "{log}", "-P", "{logs}/previous")
add("cronolog", piped(*CRONOLOG, "{log}." + DATE), needs=("cronolog",))
add("cronolog-elsewhere", piped(*CRONOLOG, "{logs}/old." + DATE), needs=("cronolog",), **AWAY)
CURRENT = {"log": "logs/current", "listed": False}
SVLOGD = f"s{MOST}\nn30\n"
add(
    "svlogd",
    piped("svlogd", "{logs}"),
    prepare=config("config", SVLOGD),
    needs=("svlogd",),
    **CURRENT,
)
add("multilog", piped("multilog", f"s{MOST}", "n30", "{logs}"), needs=("multilog",), **CURRENT)
add("s6-log", piped("s6-log", f"s{MOST}", "n30", "{logs}"), needs=("s6-log",), **CURRENT)

# Python

CONCURRENT = ("concurrent_log_handler",)
add("python-rotating", python("rotating"))
add("python-rotating-one", python("rotating-one"), keeps=False)
add("python-timed", python("timed"))
add("python-timed-gz", python("timed-gz"))
add("python-timed-log", python("timed-log"))
add("concurrent", python("concurrent"), writers=3, needs=CONCURRENT)
add("concurrent-gz", python("concurrent-gz"), writers=3, needs=CONCURRENT)
add("concurrent-timed", python("concurrent-timed"), writers=3, needs=CONCURRENT)
add("loguru", python("loguru"), needs=("loguru",))
add("loguru-gz", python("loguru-gz"), needs=("loguru",))

# JavaScript

add("winston", node("winston"), needs=("node", "winston"), listed=False, keeps=False)
add("winston-daily", node("winston-daily"), needs=("node", "winston-daily-rotate-file"), **AWAY)
add("pino-roll", node("pino-roll"), needs=("node", "pino-roll"), **AWAY, log="logs/current.log")
add("stream-classical", node("stream-classical"), needs=("node", "rotating-file-stream"))
add("stream-classical-gz", node("stream-classical-gz"), needs=("node", "rotating-file-stream"))
add("stream", node("stream"), needs=("node", "rotating-file-stream"), listed=False)
add("log4js", node("log4js"), needs=("node", "log4js"))
add("log4js-date", node("log4js-date"), needs=("node", "log4js"))

# Java

LOGBACK = """<configuration>
<appender name="file" class="ch.qos.logback.core.rolling.RollingFileAppender"><file>{log}</file>
<encoder><pattern>%m%n</pattern></encoder>
<rollingPolicy class="ch.qos.logback.core.rolling.{policy}">
<fileNamePattern>{pattern}</fileNamePattern>{more}</rollingPolicy>{trigger}
</appender><root level="info"><appender-ref ref="file"/></root></configuration>
"""
BY_SIZE = '<triggeringPolicy class="ch.qos.logback.core.rolling.SizeBasedTriggeringPolicy">'
BY_SIZE += "<maxFileSize>24000</maxFileSize></triggeringPolicy>"
INDEXED = "<minIndex>1</minIndex><maxIndex>20</maxIndex>"
SIZED = "<maxFileSize>24000</maxFileSize>"
LOG4J = """<Configuration><Appenders>
<RollingFile name="file" fileName="{log}" filePattern="{pattern}"><PatternLayout pattern="%m%n"/>
<Policies>{trigger}</Policies><DefaultRolloverStrategy max="30" {more}/></RollingFile></Appenders>
<Loggers><Root level="info"><AppenderRef ref="file"/></Root></Loggers></Configuration>
"""
OF_SIZE, EACH_SECOND = '<SizeBasedTriggeringPolicy size="24000"/>', "<TimeBasedTriggeringPolicy/>"
JAVA_NEEDS = {
    "logback": ("java", "Writer.class", "slf4j-api.jar", "logback-classic.jar", "logback-core.jar"),
    "log4j": ("java", "Writer.class", "log4j-api.jar", "log4j-core.jar"),
}
PROPERTY = {"logback": "logback.configurationFile", "log4j": "log4j2.configurationFile"}


def add_java(name: str, library: str, template: str, pattern: str, **more: object) -> None:
    fields = {key: more.pop(key, "") for key in ("policy", "more", "trigger")}

    def writer(place: Place) -> Command:
        base = place.log.with_suffix("")
        text = template.format(
            log=place.log, pattern=pattern.format(log=place.log, base=base), **fields
        )
        config = place.file(f"{library}.xml", text)
        jars = [JARS / need for need in JAVA_NEEDS[library] if need.endswith(".jar")]
        path = ":".join(map(str, [place.tools / "java", *jars]))
        return [
            "java",
            "-Xshare:auto",
            "-XX:+UseSerialGC",
            "-cp",
            path,
            f"-D{PROPERTY[library]}={config}",
            "Writer",
            library,
        ]

    add(name, writer, needs=JAVA_NEEDS[library], **more)


FIXED = {"policy": "FixedWindowRollingPolicy", "more": INDEXED, "trigger": BY_SIZE}
add_java("logback-fixed", "logback", LOGBACK, "{log}.%i", **FIXED)
add_java("logback-fixed-gz", "logback", LOGBACK, "{log}.%i.gz", **FIXED)
add_java(
    "logback-time",
    "logback",
    LOGBACK,
    "{log}.%d{{yyyy-MM-dd_HH-mm-ss}}",
    policy="TimeBasedRollingPolicy",
)
DAILY = {"policy": "SizeAndTimeBasedRollingPolicy", "more": SIZED}
add_java("logback-size-and-time", "logback", LOGBACK, "{log}.%d{{yyyy-MM-dd}}.%i", **DAILY)
add_java("logback-size-and-time-gz", "logback", LOGBACK, "{log}.%d{{yyyy-MM-dd}}.%i.gz", **DAILY)
add_java("log4j-default", "log4j", LOG4J, "{log}.%i", trigger=OF_SIZE, listed=False)
add_java("log4j-min", "log4j", LOG4J, "{log}.%i", trigger=OF_SIZE, more='fileIndex="min"')
add_java("log4j-time", "log4j", LOG4J, "{log}.%d{{yyyy-MM-dd-HH-mm-ss}}", trigger=EACH_SECOND)
add_java("log4j-date-index", "log4j", LOG4J, "{log}.%d{{yyyy-MM-dd}}.%i", trigger=OF_SIZE)
add_java(
    "log4j-before-extension-gz",
    "log4j",
    LOG4J,
    "{base}-%d{{yyyy-MM-dd}}-%i.log.gz",
    trigger=OF_SIZE,
)
