"""Floor 2: dropout as functions, and plans that put it into models from outside.

The package is itself callable: ``twodice.dropout`` names both this folder and the public function, and Python
binds the name to the folder as soon as anything below it is imported. So ``twodice.dropout(x, 0.1, key=key,
step=17)`` is answered by `twodice.dropout.functional.dropout` whichever was imported first. Importing this
package loads no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    """The module type of this package: calling it calls the function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from twodice.dropout.functional import dropout

        # From the second call on, the function itself: an import and a frame would cost every small call.
        type(self).__call__ = staticmethod(dropout)  # type: ignore[assignment]
        return dropout(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableFolder
