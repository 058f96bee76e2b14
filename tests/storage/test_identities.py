"""One contract for devices and tokens, whatever keeps them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from sumus.storage.identities import Identities, Identity, IdentityRows, Member, MemoryIdentities, Token
from sumus.storage.sql import SqlStore

TOKEN = Token("ab" * 32, "phones", 2, 1e9 + 0.5)
ALICE = Identity("0a" * 32, "phones", b"\0key of 32 bytes" * 2, "enrolled", 1.5, 2.5)


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def people(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Identities]:
    if request.param == "memory":
        yield MemoryIdentities()
        return
    url = f"sqlite:///{tmp_path}/run.db" if request.param == "sqlite" else request.getfixturevalue("postgres")
    store = SqlStore.open(url)
    if request.param == "postgresql":  # the server is the whole suite's, and other tests let devices in
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM token"))
            connection.execute(text("DELETE FROM identity"))
            connection.execute(text("DELETE FROM member"))
        engine.dispose()
    yield store.identities()
    store.close()


def everything(people: Identities) -> dict[str, Any]:
    with people.transaction() as rows:
        return {"tokens": list(rows.tokens()), "people": list(rows.identities()), "phones": rows.count("phones")}


def test_nobody_is_there_at_first(people: Identities) -> None:
    assert everything(people) == {"tokens": [], "people": [], "phones": 0}
    with people.transaction() as rows:
        assert (rows.token(TOKEN.hash), rows.identity(ALICE.id)) == (None, None)


def test_what_is_written_is_read_in_the_same_transaction_and_after_it(people: Identities) -> None:
    with people.transaction() as rows:
        rows.put_token(TOKEN)
        rows.put_identity(ALICE)
        assert (rows.token(TOKEN.hash), rows.identity(ALICE.id)) == (TOKEN, ALICE)
        assert (list(rows.tokens()), list(rows.identities()), rows.count("phones")) == ([TOKEN], [ALICE], 1)
    with people.transaction() as rows:
        assert (rows.token(TOKEN.hash), rows.identity(ALICE.id)) == (TOKEN, ALICE)
        rows.put_token(replace(TOKEN, uses=1))
        rows.put_identity(replace(ALICE, seen=9.0))
    with people.transaction() as rows:
        assert (rows.token(TOKEN.hash), rows.identity(ALICE.id)) == (replace(TOKEN, uses=1), replace(ALICE, seen=9.0))
        rows.drop_token(TOKEN.hash)
        rows.drop_token("of nobody")
        assert rows.token(TOKEN.hash) is None
    assert everything(people) == {"tokens": [], "people": [replace(ALICE, seen=9.0)], "phones": 1}


def test_a_transaction_that_fails_leaves_nothing(people: Identities) -> None:
    with people.transaction() as rows:
        rows.put_token(TOKEN)
    before = everything(people)

    def fails(rows: IdentityRows) -> None:
        rows.put_token(replace(TOKEN, uses=1))
        rows.put_identity(ALICE)
        assert rows.count("phones") == 1
        rows.drop_token(TOKEN.hash)
        raise KeyError("in the midst of it")

    with pytest.raises(KeyError), people.transaction() as rows:
        fails(rows)
    assert everything(people) == before


def test_a_device_is_found_as_it_was_left_while_others_write(people: Identities) -> None:
    assert people.find(ALICE.id) is None
    with people.transaction() as rows:
        rows.put_identity(ALICE)
    with people.transaction() as rows:
        rows.put_identity(replace(ALICE, state="revoked"))
        assert rows.count("phones") == 0, "it is written"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(people.find, ALICE.id).result(10) == ALICE
    assert people.find(ALICE.id) == replace(ALICE, state="revoked")


def test_only_who_is_enrolled_in_a_population_counts(people: Identities) -> None:
    with people.transaction() as rows:
        for place, (population, state) in enumerate(
            [("phones", "enrolled"), ("phones", "revoked"), ("phones", "withdrawn"), ("edges", "enrolled")]
        ):
            rows.put_identity(replace(ALICE, id=f"{place:064}", population=population, state=state))
        assert [rows.count(population) for population in ("phones", "edges", "nobody")] == [1, 1, 0]


def test_devices_are_listed_page_by_page_in_the_order_of_their_ids(people: Identities) -> None:
    ids = [f"{place * 7919 % 1000003:064x}" for place in range(25)]
    with people.transaction() as rows:
        for id in ids:
            rows.put_identity(replace(ALICE, id=id))
    listed, pages = list[str](), 0
    with people.transaction() as rows:
        while page := rows.identities(after=listed[-1] if listed else "", limit=10):
            listed += [row.id for row in page]
            pages += 1
    assert (listed, pages) == (sorted(ids), 3)
    with people.transaction() as rows:
        assert [row.id for row in rows.identities()] == sorted(ids)


def test_each_device_asks_through_one_edge(people: Identities) -> None:
    one, two, three = (Member(f"{place}" * 64, "edge", place, 10.0 * place) for place in (1, 2, 3))
    with people.transaction() as rows:
        assert (rows.member(one.device), rows.count_members("edge")) == (None, 0)
        for row in (one, two, three):
            rows.put_member(row)
        rows.put_member(replace(two, edge="another"))
        assert (rows.count_members("edge"), rows.count_members("another")) == (2, 1)
    assert list(people.find_members([one.device, two.device, "of nobody"])) == [one, replace(two, edge="another")]
    with people.transaction() as rows:
        rows.read_ahead([one.device, three.device])
        rows.drop_members("edge", before=30.0)
        assert (rows.member(one.device), rows.member(three.device)) == (None, three)
        rows.drop_members("edge")
        rows.drop_member(two.device)
        rows.drop_member("of nobody")
        assert [rows.count_members(edge) for edge in ("edge", "another")] == [0, 0]
    assert list(people.find_members([one.device, two.device, three.device])) == []


@pytest.mark.parametrize("people", ["sqlite", "postgresql"], indirect=True)
def test_a_token_of_three_uses_lets_three_in_whoever_comes_at_once(people: Identities) -> None:
    with people.transaction() as rows:
        rows.put_token(replace(TOKEN, uses=3))

    def enrol(place: int) -> bool:
        with people.transaction() as rows:
            token = rows.token(TOKEN.hash)
            if token is None:
                return False
            rows.put_identity(replace(ALICE, id=f"{place:064}"))
            if token.uses == 1:
                rows.drop_token(token.hash)
            else:
                rows.put_token(replace(token, uses=token.uses - 1))
            return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(enrol, range(12))) == 3
    assert everything(people)["phones"] == 3
