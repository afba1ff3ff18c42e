"""Put the compiled kernels into a wheel where there is a C compiler; else they are compiled at their first use."""

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsBuildHook(BuildHookInterface):
    """Compile ``monai_lm/kernels/cpu.c`` for any CPU of this machine's kind that has AVX2, or for any at all."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling; an editable installation compiles at its first use, whenever the source has changed."""
        if version == "editable":
            return
        kernels = Path(self.root) / "monai_lm" / "kernels"
        spec = importlib.util.spec_from_file_location("kernels_build", kernels / "build.py")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = build
        spec.loader.exec_module(build)
        instructions = "AVX2" if build.is_x86() else "plain"
        name = build.library_name(instructions)
        folder = Path(self.directory) / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            library = build.compile_library(folder / name, instructions)
        except build.BuildError as error:
            self.app.display_warning(f"no compiled kernels in the wheel: {error}")
            return
        build_data["force_include"][str(library)] = f"monai_lm/kernels/built/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
