"""Folk tunes in ABC notation: reads them, measures their bars, gives their notes and writes MIDI files.

The tunes are those of O'Neill, Aird and Ryan in the corpus of `music21`. A tune is kept as two lines:
metre, unit length and key ("M:6/8 L:1/8 K:G"), and the melody without ornaments.
"""

import importlib.util
import re
import struct
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

BOOKS = ["oneills1850", "airdsAirs", "ryansMammoth"]
# Comments, fields, chord names, grace notes, slurs and the signs of ornaments.
ORNAMENTS = re.compile(
    r'%.*|^[A-Za-z]:.*|"[^"]*"|\{[^}]*\}|![^!\n]*!|\((?!\d)|[\\`~.!)TuvHSMPUVyROk]', re.MULTILINE
)
MELODY = re.compile(r"[A-Ga-gz0-9',/<>^=_|:(\[\] -]+")
TOKEN = re.compile(
    r"""(?P<bar>[|:\[]*\|[|:\]]*(?:\ ?\[?[12])?|::|\[[12])
    |\((?P<tuplet>[2-9])
    |(?P<broken><+|>+)
    |(?P<notes>\[[^|\]]*\]|[_=^]*[A-Ga-gz][,']*)(?P<times>\d*)(?P<slashes>/*)(?P<parts>\d*)""",
    re.VERBOSE,
)
NOTE = re.compile(r"([_=^]*)([A-Ga-g])([,']*)")
ACCIDENTALS = {"__": -2, "_": -1, "=": 0, "^": 1, "^^": 2}
SEMITONES = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
MODES = {"": 0, "lyd": 1, "mix": -1, "dor": -2, "m": -3, "phr": -4}  # sharps more than in major
TICKS = 1920  # of a whole note in a MIDI file


class Note(NamedTuple):
    start: Fraction  # in whole notes, as all times
    end: Fraction
    pitch: int  # MIDI's number


class Bar(NamedTuple):
    start: Fraction
    end: Fraction
    border: bool  # A bar that begins or ends a part may be short.


def load() -> list[list[str]]:
    """The tunes in groups. Tunes with one title, or with the same first 30 notes, are in one group."""
    folder = importlib.util.find_spec("music21").submodule_search_locations[0]
    groups: dict[str | tuple[int, ...], list[str]] = {}  # by titles and by openings
    for path in (path for book in BOOKS for path in sorted(Path(folder, "corpus", book).glob("*.abc"))):
        for text in re.split(r"(?m)^X:", path.read_text(encoding="latin-1"))[1:]:
            header, key, melody = [*re.split(r"(?m)^K:(.*)\n", text, maxsplit=1), "", ""][:3]
            tune = simplify(header, key, melody.split("\n\n")[0])
            if tune:
                title = re.search(r"(?m)^T:(.*)|\Z", header)[0].removeprefix("T:")
                title = re.sub(r"^THE|THE$", "", re.sub(r"[^A-Z]", "", title.upper()))
                group = groups.setdefault(title, [])
                other = groups.setdefault(tuple(note.pitch for note in parse(tune)[0][:30]), group)
                group.append(tune)
                if other is not group:
                    group += other
                    groups.update({key: group for key, part in groups.items() if part is other})
    return list({id(group): group for group in groups.values()}.values())


def simplify(header: str, key: str, melody: str) -> str | None:
    """The tune in two lines, or None if it has more than this program reads."""
    metre = re.search(r"(?m)^M: *(C\|?|\d+/\d+)", header)
    unit = re.search(r"(?m)^L: *(1/\d+)", header)
    tonic = re.match(
        r" *([A-G][#b]?) *(maj|min|mix|dor|lyd|phr|m(?![a-z])|$)", key.lower().capitalize()
    )
    if not (metre and tonic) or re.search(r"(?m)^[KLM]:|\[[A-Z]:", melody):
        return None
    melody = re.sub(r"\s+", " ", ORNAMENTS.sub("", melody))
    melody = re.sub(r" *([|:]+) *", r"\1", melody).strip()
    length = unit[1] if unit else "1/16" if whole_notes(metre[1]) < Fraction(3, 4) else "1/8"
    mode = tonic[2].replace("min", "m").replace("maj", "")
    return f"M:{metre[1]} L:{length} K:{tonic[1]}{mode}\n{melody}" if MELODY.fullmatch(melody) else None


def whole_notes(metre: str) -> Fraction:
    return Fraction(1) if metre in ("C", "C|") else Fraction(metre)


def signature(key: str) -> dict[str, int]:
    """The semitones by which a key raises each letter."""
    tonic, mode = re.fullmatch(r"([A-G][#b]?)(.*)", key).groups()
    sharps = "FCGDAEB".index(tonic[0]) - 1 + {"#": 7, "b": -7}.get(tonic[1:], 0) + MODES[mode]
    return {letter: (sharps - k + 6) // 7 for k, letter in enumerate("FCGDAEB")}


def pitches(chord: str, key: dict[str, int], raised: dict[str, int]) -> list[int]:
    """MIDI's numbers of the notes. An accidental goes into `raised`: it holds until the bar ends."""
    numbers = []
    for accidental, letter, octaves in NOTE.findall(chord):
        if accidental in ACCIDENTALS:
            raised[letter] = ACCIDENTALS[accidental]
        octave = 5 + letter.islower() + octaves.count("'") - octaves.count(",")
        semitones = SEMITONES[letter.upper()] + raised.get(letter, key[letter.upper()])
        numbers.append(min(max(12 * octave + semitones, 0), 127))
    return numbers


def parse(tune: str) -> tuple[list[Note], list[Bar]]:
    """The notes and the bars of a tune. What is no ABC notation is passed over."""
    header, melody = tune.split("\n")
    fields = dict(field.split(":") for field in header.split())
    unit, key = Fraction(fields["L"]), signature(fields["K"])
    durations: list[Fraction] = []
    chords: list[list[int]] = []
    marks = [(0, True)]  # of each bar line: the number of chords before it; is it the border of a part?
    raised: dict[str, int] = {}  # letters with an accidental in this bar
    scale, tuplet, left = Fraction(1), Fraction(1), 0
    for token in TOKEN.finditer(melody):
        if token["bar"]:
            marks.append((len(chords), token["bar"] != "|"))
            raised = {}
        elif token["tuplet"]:
            left = int(token["tuplet"])
            tuplet = Fraction({2: 3, 4: 3, 8: 3}.get(left, 2), left)
        elif token["broken"]:
            short = Fraction(1, 2 ** len(token["broken"]))
            before, scale = (2 - short, short) if token["broken"][0] == ">" else (short, 2 - short)
            if durations:
                durations[-1] *= before
        else:
            parts = int(token["parts"] or 0) or 2 ** len(token["slashes"])
            duration = unit * int(token["times"] or 1) / parts * scale * (tuplet if left > 0 else 1)
            durations.append(duration)
            scale, left = Fraction(1), left - 1
            chords.append(pitches(token["notes"], key, raised))
    times = [Fraction(0), *accumulate(durations)]
    notes = [Note(times[k], times[k + 1], pitch) for k, chord in enumerate(chords) for pitch in chord]
    marks.append((len(chords), True))
    bars = [
        Bar(times[first], times[last], border or next_border)
        for (first, border), (last, next_border) in pairwise(marks)
        if last > first
    ]
    return notes, bars


def right_bars(tune: str) -> tuple[int, int]:
    """The number of bars inside parts that are as long as the metre says, and of all of them."""
    metre = whole_notes(re.match(r"M:(\S+)", tune)[1])
    inner = [bar for bar in parse(tune)[1] if not bar.border]
    return sum(bar.end - bar.start == metre for bar in inner), len(inner)


def write_midi(path: Path, notes: list[Note], seconds: float = 2.0) -> None:
    """Write a MIDI file of format 0; a whole note lasts `seconds`."""

    def number(value: int) -> bytes:  # seven bits in a byte, the highest first
        groups = [value & 127]
        while value := value >> 7:
            groups.insert(0, value & 127 | 128)
        return bytes(groups)

    track = b"\x00\xff\x51\x03" + round(seconds / 4 * 1e6).to_bytes(3, "big")
    time = 0
    # At one time a note ends before the next one begins.
    changes = sorted([(n.start, 1, n.pitch) for n in notes] + [(n.end, 0, n.pitch) for n in notes])
    for moment, begins, pitch in changes:
        ticks = round(moment * TICKS)
        track += number(ticks - time) + bytes([0x90, pitch, 80 * begins])
        time = ticks
    track += b"\x00\xff\x2f\x00"
    head = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS // 4)
    path.write_bytes(head + b"MTrk" + struct.pack(">I", len(track)) + track)
