"""combine_selections: several selections -> a mixture, from which an arm takes its generated images.

Bartoldson et al. 2024 trained on the images of three generators. A mixture holds no images and no indices.
"""

from dmat import ARTIFACTS, files
from dmat.config import Mixture
from dmat.data.mixtures import MIXTURE
from dmat.data.selections import checksums, read_selection
from dmat.errors import DmatError
from dmat.job import Job, Result


def run(settings: Mixture, job: Job) -> Result:
    """Writes mixture.json. Raises DmatError where the selections differ in the size of images or the classes."""
    records = {name: read_selection(job.inputs[name]) for name in settings.of}
    first, *others = records
    for name in others:
        if any(records[name][key] != records[first][key] for key in ("shape", "classes")):
            raise DmatError(
                f"mixture {job.instance['mixture']}: {name} has images {records[name]['shape']} of "
                f"{records[name]['classes']} classes, {first} {records[first]['shape']} of "
                f"{records[first]['classes']}; expected the same; leave one of them out"
            )
    files.write_json(
        job.result / "mixture" / MIXTURE,
        {
            "schema": 1,
            "shape": records[first]["shape"],
            "classes": records[first]["classes"],
            "kept": sum(record["kept"] for record in records.values()),
            "rotate": settings.rotate,
            "shares": settings.of,
            "selections": {
                name: {
                    "path": f"{ARTIFACTS}/select_images/{name}",
                    **record,
                    **checksums(job.inputs[name], record),
                }
                for name, record in records.items()
            },
        },
    )
    return Result({"selections": len(records), "images": sum(record["kept"] for record in records.values())})
