"""Pictures and pages: token groups drawn on photographs, charts, and the self-contained report of the demo.

    from squeezevit.report import figure, stages_from_trace
    figure(photo, stages_from_trace(t, 0), grid=(16, 16)).save("groups.png")

Needs Pillow and NumPy; the charts of `write_report` need matplotlib. All three come with the extra `cli`:
`pip install "squeezevit[cli]"`.
"""

from squeezevit.errors import MissingExtraError

try:
    from squeezevit.report.html import write_report
    from squeezevit.report.overlay import Panel, StageGroups, draw_stage, figure, panels, stages_from_trace
except ModuleNotFoundError as error:
    if error.name not in {"numpy", "PIL"}:
        raise
    message = f'squeezevit.report needs {error.name}, which is not installed: pip install "squeezevit[cli]"'
    raise MissingExtraError(message) from error

__all__ = ["Panel", "StageGroups", "draw_stage", "figure", "panels", "stages_from_trace", "write_report"]
