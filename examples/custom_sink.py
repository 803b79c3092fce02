"""A sink of your own: every note as a line of a CSV file, its frequency included. From this folder's parent:

    rt-mpe listen --source demo --sink examples.custom_sink:CsvSink:notes.csv

Override what you need of note_on, note_off, status and close; what comes behind the class name is the argument.
"""

import csv

from realtime_mpe.errors import UserError
from realtime_mpe.sinks.base import NoteSink


class CsvSink(NoteSink):
    def __init__(self, path: str):
        try:  # open things here: what fails before the first sound can still be mended
            self.file = open(path, "a", newline="")
        except OSError as e:
            raise UserError(f"cannot write {path!r}: {e.strerror}; choose another place") from e
        self.rows = csv.writer(self.file)

    def note_off(self, note):  # only now is the length known
        hertz = 440 * 2 ** ((note.midi - 69) / 12)
        self.rows.writerow([f"{note.onset:.3f}", f"{note.offset:.3f}", f"voice {note.voice + 1}", f"{hertz:.1f}"])

    def close(self):  # may be called twice
        self.file.close()
