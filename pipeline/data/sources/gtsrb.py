"""GTSRB: 43 German traffic signs in 39,209 frames of 1,307 tracks (Stallkamp et al. 2012), one frame of each track.

The thirty frames of a track are one sign, filmed while the car drives up to it: near copies. An episode that had one
in its support and another among its queries would ask for the track, not for the sign. So a track gives one image, its
middle frame (neither the smallest nor the sharpest): 7 to 75 images a sign, and any episode is of different tracks
without a rule of its own. The official test part is left out, because its files do not tell which track they are of.
"""

import re
from collections.abc import Sequence

from pipeline.data.sources.base import Skip
from pipeline.data.sources.photographs import Photographs
from pipeline.data.sources.tree import Classes, Entry
from pipeline.errors import PipelineError

_FRAME = re.compile(r"(?:^|/)(\d{1,5})/(?:\d{5}_)?(\d{5})_(\d{5})\.(?:ppm|png|jpe?g)$", re.IGNORECASE)


class Gtsrb(Photographs):
    """``path``: a folder or zip archive whose training part is class folders of frames TRACK_FRAME.

    Official (``Final_Training/Images/00014/00003_00029.ppm``), torchvision's (``Training/00014/...``) and Kaggle's
    (``Train/14/00014_00003_00029.png``); classes are named as officially, 00000 to 00042.
    """

    kind = "gtsrb"
    layout = "GTSRB's training images in class folders, .../00014/00003_00029.ppm or .../14/00014_00003_00029.png"

    def classes(self, listed: Sequence[Entry], known: set[str]) -> tuple[Classes, list[Skip]]:
        tracks: dict[tuple[str, str], dict[str, Entry]] = {}
        skipped = []
        for entry in listed:
            match = _FRAME.search(entry.name)
            if match is None or match[1].zfill(5) not in known:
                skipped.append(Skip(entry.name, "", "not_in_split", "is no frame of a training track"))
                continue
            sign, track, frame = match[1].zfill(5), match[2], match[3]
            other = tracks.setdefault((sign, track), {}).setdefault(frame, entry)
            if other is not entry:
                raise PipelineError(
                    f"data.source.path={self.given} holds GTSRB twice, as in {other.name} and {entry.name}; give the "
                    "folder of one"
                )
        classes: Classes = {}
        for (sign, track), frames in sorted(tracks.items()):
            ordered = [frames[frame] for frame in sorted(frames)]
            middle = ordered.pop(len(ordered) // 2)
            classes.setdefault(sign, []).append(middle)
            detail = f"is of track {track} like {middle.name.rpartition('/')[2]}"
            skipped += [Skip(entry.name, sign, "near_copy", detail) for entry in ordered]
        return classes, skipped
