"""The words of the generated acceptability task.

None of the dev split's nouns, verbs and adjectives occurs in the train split.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Noun(NamedTuple):
    """A noun in both numbers."""

    singular: str
    plural: str


class Verb(NamedTuple):
    """A regular verb; its participle is its past form."""

    base: str
    third: str
    past: str
    ing: str


class IrregularVerb(NamedTuple):
    """A verb whose past form and participle differ."""

    base: str
    past: str
    participle: str


@dataclass(frozen=True)
class Vocabulary:
    """The content words of one split.

    Verbs are sorted by what follows them: a person (``transitive``), "at" and a person
    (``intransitive``), a thing (``handling``, ``irregular``).
    """

    people: tuple[Noun, ...]
    things: tuple[Noun, ...]
    transitive: tuple[Verb, ...]
    intransitive: tuple[Verb, ...]
    handling: tuple[Verb, ...]
    irregular: tuple[IrregularVerb, ...]
    adjectives: tuple[str, ...]

    def words(self) -> frozenset[str]:
        """Give every form of every word."""
        tables: tuple[tuple[tuple[str, ...], ...], ...] = (
            self.people,
            self.things,
            self.transitive,
            self.intransitive,
            self.handling,
            self.irregular,
        )
        forms = {form for table in tables for entry in table for form in entry}
        return frozenset(forms | set(self.adjectives))


def _nouns(table: str) -> tuple[Noun, ...]:
    """Read ``singular/plural`` entries."""
    return tuple(Noun(*entry.split("/")) for entry in table.split())


def _verbs(table: str) -> tuple[Verb, ...]:
    """Read ``base/third/past/ing`` entries."""
    return tuple(Verb(*entry.split("/")) for entry in table.split())


def _irregular(table: str) -> tuple[IrregularVerb, ...]:
    """Read ``base/past/participle`` entries."""
    return tuple(IrregularVerb(*entry.split("/")) for entry in table.split())


def _words(table: str) -> tuple[str, ...]:
    """Read words without forms."""
    return tuple(table.split())


TRAIN_VOCABULARY = Vocabulary(
    people=_nouns(
        """
        doctor/doctors teacher/teachers pilot/pilots child/children student/students
        lawyer/lawyers farmer/farmers singer/singers artist/artists soldier/soldiers
        baker/bakers driver/drivers writer/writers sailor/sailors woman/women
        guest/guests dancer/dancers banker/bankers judge/judges waiter/waiters
        visitor/visitors manager/managers painter/painters neighbor/neighbors
        """
    ),
    things=_nouns(
        """
        book/books lamp/lamps table/tables picture/pictures bottle/bottles
        window/windows letter/letters chair/chairs car/cars basket/baskets
        mirror/mirrors ladder/ladders ticket/tickets wheel/wheels plate/plates
        blanket/blankets camera/cameras box/boxes knife/knives garden/gardens
        """
    ),
    transitive=_verbs(
        """
        praise/praises/praised/praising visit/visits/visited/visiting
        follow/follows/followed/following ignore/ignores/ignored/ignoring
        trust/trusts/trusted/trusting thank/thanks/thanked/thanking
        blame/blames/blamed/blaming protect/protects/protected/protecting
        annoy/annoys/annoyed/annoying invite/invites/invited/inviting
        defend/defends/defended/defending respect/respects/respected/respecting
        surprise/surprises/surprised/surprising hire/hires/hired/hiring
        """
    ),
    intransitive=_verbs(
        """
        smile/smiles/smiled/smiling laugh/laughs/laughed/laughing
        wave/waves/waved/waving stare/stares/stared/staring
        look/looks/looked/looking yell/yells/yelled/yelling
        growl/growls/growled/growling blink/blinks/blinked/blinking
        sneer/sneers/sneered/sneering snarl/snarls/snarled/snarling
        """
    ),
    handling=_verbs(
        """
        clean/cleans/cleaned/cleaning open/opens/opened/opening
        move/moves/moved/moving buy/buys/bought/buying sell/sells/sold/selling
        carry/carries/carried/carrying check/checks/checked/checking
        repair/repairs/repaired/repairing find/finds/found/finding
        wash/washes/washed/washing drop/drops/dropped/dropping
        use/uses/used/using need/needs/needed/needing
        """
    ),
    irregular=_irregular(
        """
        break/broke/broken take/took/taken choose/chose/chosen see/saw/seen
        shake/shook/shaken freeze/froze/frozen ride/rode/ridden tear/tore/torn
        know/knew/known write/wrote/written drive/drove/driven
        """
    ),
    adjectives=_words(
        """
        tired hungry happy tall young clever famous rich quiet nervous strong old
        angry lazy honest polite busy lonely proud sick
        """
    ),
)

DEV_VOCABULARY = Vocabulary(
    people=_nouns(
        """
        nurse/nurses king/kings actor/actors boy/boys girl/girls man/men
        engineer/engineers senator/senators chef/chefs tourist/tourists
        hunter/hunters poet/poets
        """
    ),
    things=_nouns(
        """
        coat/coats door/doors phone/phones clock/clocks candle/candles bag/bags
        cup/cups shelf/shelves piano/pianos bridge/bridges
        """
    ),
    transitive=_verbs(
        """
        admire/admires/admired/admiring help/helps/helped/helping
        greet/greets/greeted/greeting criticize/criticizes/criticized/criticizing
        warn/warns/warned/warning love/loves/loved/loving
        """
    ),
    intransitive=_verbs(
        """
        shout/shouts/shouted/shouting glance/glances/glanced/glancing
        grin/grins/grinned/grinning bark/barks/barked/barking
        """
    ),
    handling=_verbs(
        """
        push/pushes/pushed/pushing paint/paints/painted/painting
        pull/pulls/pulled/pulling keep/keeps/kept/keeping
        destroy/destroys/destroyed/destroying
        """
    ),
    irregular=_irregular(
        """
        steal/stole/stolen throw/threw/thrown weave/wove/woven draw/drew/drawn
        wear/wore/worn
        """
    ),
    adjectives=_words("short kind brave friendly poor calm weak gentle sad wise"),
)
