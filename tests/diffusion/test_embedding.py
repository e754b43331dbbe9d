"""What a network is told: encoded, embedded, dropped, guided, grown and exported."""

import copy
import math

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet

from scripts.diffusion.asked import conditions_asked, requests
from scripts.diffusion.embedding import CovariateEmbedding, with_covariates, with_new_covariates, without_unknown
from scripts.diffusion.objective import SeededPrepareBatch
from scripts.diffusion.sampler import DiffusionSampler
from scripts.diffusion.wavelets import in_wavelets
from scripts.running.covariates import encoded, known_covariates, num_class_embeds, of_classes, unknown_of
from scripts.running.errors import BundleError

AGE = {"name": "age", "mean": 50.0, "std": 20.0, "min": 20, "max": 80}
SEX = {"name": "sex", "words": ["f", "m"]}
BOTH = [AGE, SEX]


def unet_with(covariates, levels=0, scheduler=None):
    torch.manual_seed(0)
    channels = 8**levels
    unet = DiffusionModelUNet(
        3, channels, channels, 1, (16, 16), (False, False), 8, num_head_channels=16,
        num_class_embeds=num_class_embeds(covariates),
    )  # fmt: skip
    if scheduler:  # as the configs build it
        unet = in_wavelets(unet, levels, scheduler, "cosine", "sample", covariates=covariates)
    else:
        unet = with_covariates(unet, covariates)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.1)
    return unet.eval()


def noise(count, side=8, seed=0):
    return torch.randn(count, 1, side, side, side, generator=torch.Generator().manual_seed(seed))


def test_numbers_are_standardised_words_are_indices_and_what_is_missing_is_unknown():
    assert encoded({"age": 70, "sex": "m"}, BOTH) == [1.0, 1.0]
    age, sex = encoded({}, BOTH)
    assert math.isnan(age) and sex == 2.0
    assert encoded({"sex": "f"}, [SEX]) == 0 and encoded({"sex": None}, [SEX]) == 2 == unknown_of([SEX])
    assert known_covariates({"class_names": ["a", "b"]}) == of_classes(["a", "b"])
    assert known_covariates({"class_names": ["a"], "covariates": BOTH}) == BOTH
    assert [num_class_embeds(c) for c in ([], [SEX], [AGE], BOTH)] == [None, 3, 1, 1]


def test_the_embedding_is_the_sum_of_its_parts_and_knows_the_unknown():
    torch.manual_seed(0)
    embedding = CovariateEmbedding(BOTH, 6)
    embedding.parts[0].unknown.data.normal_()
    told = torch.tensor([[0.5, 0.0], [math.nan, 1.0], [0.5, math.nan], [math.nan, 2.0], [0.5, 7.0]])
    number, table = embedding.parts[0], embedding.parts[1].weight
    hidden = torch.nn.functional.silu(number.first(torch.tensor([[0.5]])))
    known = number.second(hidden)[0]
    unknown = number.unknown
    wanted = [known + table[0], unknown + table[1], known + table[2], unknown + table[2], known + table[2]]
    torch.testing.assert_close(embedding(told), torch.stack(wanted))
    embedding(told).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in embedding.parameters())  # NaN must not leak


def test_parts_are_dropped_alone_and_together(scheduler):
    prepare = SeededPrepareBatch(scheduler, "epsilon", covariates=BOTH, class_dropout=0.2)
    draws = torch.arange(4000)
    batch = {"image": torch.zeros(4000, 1, 1), "draw": draws, "condition": torch.tensor([[0.5, 1.0]]).repeat(4000, 1)}
    found = prepare(batch, "cpu")[3]["class_labels"]
    age, sex = found[:, 0].isnan(), found[:, 1] == 2
    assert (age & sex).float().mean() == pytest.approx(0.2 + 0.8 * 0.04, abs=0.025)
    assert age.float().mean() == pytest.approx(0.36, abs=0.03) and sex.float().mean() == pytest.approx(0.36, abs=0.03)
    assert torch.equal(
        found[:50].nan_to_num(9), prepare({k: v[:50] for k, v in batch.items()}, "cpu")[3]["class_labels"].nan_to_num(9)
    )
    whole = SeededPrepareBatch(scheduler, "epsilon", covariates=BOTH)(batch, "cpu")[3]["class_labels"]
    assert torch.equal(whole, batch["condition"])


@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_volume_does_not_depend_on_its_batch_and_the_archive_samples_the_same(scheduler, levels, scale):
    network = unet_with(BOTH, levels, scheduler)
    sampler = DiffusionSampler(
        network, scheduler, 4, "dpmpp_2m_sde", "sample", guidance_scale=scale, condition=[1.0, 0.0]
    )
    told = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [math.nan, 2.0]])
    together = sampler(noise(3), told)
    for i in range(3):
        torch.testing.assert_close(sampler(noise(3)[i : i + 1], told[i : i + 1])[0], together[i], atol=1e-5, rtol=0)
    torch.testing.assert_close(sampler(noise(1))[0], together[0], atol=1e-5, rtol=0)  # its own condition
    torch.testing.assert_close(sampler(noise(1), "{'age': 70, 'sex': 'f'}")[0], together[0], atol=1e-5, rtol=0)
    assert (together[0] - sampler(noise(3)[:1], told[1:2])[0]).abs().max() > 1e-3
    archive = torch.jit.script(sampler)
    torch.testing.assert_close(archive(noise(3), told), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(archive(noise(2)), sampler(noise(2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "old, new",
    [([], BOTH), ([AGE], BOTH), ([SEX], BOTH), ([], [SEX]), (BOTH, [*BOTH, {"name": "site", "words": ["a"]}])],
)
def test_a_network_grown_by_covariates_says_the_same_whatever_it_is_told_that_is_new(old, new):
    before, after = unet_with(old), unet_with(new)
    weights = with_new_covariates(before.state_dict(), old, new, after.state_dict())
    after.load_state_dict(weights)
    values = [{"age": 30, "sex": "m", "site": "a"}, {"age": 66}, {"sex": "f"}]
    x, times = noise(3), torch.tensor([3, 50, 90])

    def output(unet, covariates):
        told = [
            encoded({k: v for k, v in each.items() if k in [c["name"] for c in old]}, covariates) for each in values
        ]
        return unet(x, times, class_labels=torch.tensor(told)) if covariates else unet(x, times)

    def told_all(unet):
        return unet(x, times, class_labels=torch.tensor([encoded(each, new) for each in values]))

    torch.testing.assert_close(output(after, new), output(before, old), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(told_all(after), output(before, old), atol=1e-5, rtol=1e-5)
    trained = copy.deepcopy(after)
    torch.nn.functional.mse_loss(told_all(trained), x).backward()
    changed = [n for n, p in trained.named_parameters() if n.startswith("class_embedding") and p.grad.abs().max() > 0]
    assert changed  # what is new can be learnt


def test_words_are_found_again_by_their_names():
    old, new = [{"name": "site", "words": ["b", "c"]}], [{"name": "site", "words": ["b", "c", "a"]}, AGE]
    table = torch.arange(12.0).reshape(3, 4)
    wanted = CovariateEmbedding(new, 4).state_dict()
    weights = with_new_covariates(
        {"class_embedding.weight": table, "time_embed.2.bias": torch.ones(4)},
        old, new, {f"class_embedding.{k}": v for k, v in wanted.items()},
    )  # fmt: skip
    assert torch.equal(weights["class_embedding.parts.0.weight"], (table - table[2])[[0, 1, 2, 2]])  # "a" is unknown
    assert torch.equal(weights["time_embed.2.bias"], 1 + table[2])


@pytest.mark.parametrize("covariates", [BOTH, [AGE], [SEX]])
def test_without_its_embedding_a_network_is_the_one_that_is_told_nothing(covariates):
    told, plain = unet_with(covariates), unet_with([])
    x, times = noise(2), torch.tensor([3, 90])
    values = [{"age": 30, "sex": "m"}, {}]
    labels = torch.tensor([encoded(each, covariates) for each in values])
    nothing = torch.tensor([unknown_of(covariates)] * 2)
    before, unknown = told(x, times, class_labels=labels), told(x, times, class_labels=nothing)
    weights = without_unknown(told.state_dict(), covariates)
    told.load_state_dict(weights)
    torch.testing.assert_close(told(x, times, class_labels=labels), before, atol=1e-5, rtol=1e-5)
    plain.load_state_dict({k: v for k, v in weights.items() if not k.startswith("class_embedding")})
    torch.testing.assert_close(plain(x, times), unknown, atol=1e-5, rtol=1e-5)
    again = without_unknown(weights, covariates)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    # what a training without them begins with
    assert with_new_covariates(told.state_dict(), covariates, [], {}).keys() == plain.state_dict().keys()


def test_what_is_asked_for_is_one_for_all_a_list_in_turn_or_a_sweep(caplog):
    found = requests(2, {"age": [20, 40, 60], "sex": "f"}, None, BOTH)
    assert [(item["image"], item["row"], item["said"]) for item in found[:4]] == [
        (0, 0, "age 20, sex f"), (0, 0, "age 40, sex f"), (0, 0, "age 60, sex f"), (1, 1, "age 20, sex f"),
    ]  # fmt: skip
    assert found[1]["suffix"] == "_age40_sexf" and found[1]["condition"].tolist() == [-0.5, 0.0]
    turn = requests(3, [{"age": 20}, {"sex": "m"}], None, BOTH)
    assert [item["said"] for item in turn] == ["age 20", "sex m", "age 20"] and turn[0]["suffix"] == ""
    assert conditions_asked("{'age': 30}", None, BOTH) == ([{"age": 30}], False)
    assert conditions_asked(["age", "sex"], None, BOTH) == ([{}], False)  # of the preset of the training
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    requests(1, {"age": 95}, None, BOTH)
    assert "age 95 was given, but the weights were trained on 20 to 80" in caplog.text


@pytest.mark.parametrize("name, comma", [("people.tsv", "\t"), ("people.csv", ",")])
def test_the_rows_of_a_table_are_taken_in_turn(tmp_path, name, comma):
    lines = ["participant_id,age,sex,height", "a,30,f,170", "b,n/a,m,", "c,61.5,unknown,180"]
    (tmp_path / name).write_text("\n".join(lines).replace(",", comma))
    found = requests(4, str(tmp_path / name), None, BOTH)
    assert [item["said"] for item in found] == ["age 30.0, sex f", "sex m", "age 61.5", "age 30.0, sex f"]
    assert found[1]["values"] == {"age": "n/a", "sex": "m"} and math.isnan(found[1]["condition"][0])


@pytest.mark.parametrize(
    "lines, words",
    [
        (["id,height", "a,170"], ["people.csv", "['id', 'height']", "columns out of age (a number), sex (one of"]),
        (["age", "20", "old"], ["line 3 of", "people.csv", "age is 'old'", "a number"]),
        (["age,sex", "20,x"], ["line 2 of", "sex is 'x'", "one of ['f', 'm']"]),
        (["age"], ["people.csv", "has no rows"]),
        (None, ["people.csv", "cannot be read"]),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path, lines, words):
    if lines:
        (tmp_path / "people.csv").write_text("\n".join(lines))
    with pytest.raises(BundleError) as error:
        requests(1, str(tmp_path / "people.csv"), None, BOTH)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "covariates, label, scale, words",
    [
        ({"agee": 70}, None, 1, ["'agee'", "age (a number)", "sex (one of ['f', 'm'])"]),
        ({"age": "old"}, None, 1, ["age 'old'", "a number"]),
        ({"sex": "x"}, None, 1, ["sex 'x'", "one of ['f', 'm']"]),
        ({"age": []}, None, 1, ["asks for no volume"]),
        ("{'age': ", None, 1, ["expected such as {'age': 70"]),
        ([70], None, 1, ["or a list of these"]),
        (["age", "height"], None, 1, ["or a list of these"]),
        ({"age": 70}, "f", 1, ["class_label: 'f'", "beside covariates"]),
        (None, None, 2, ["guidance_scale: 2"]),
        ({"age": None}, None, 2, ["guidance_scale: 2"]),
    ],
)
def test_what_the_weights_do_not_know_is_refused(covariates, label, scale, words):
    with pytest.raises(BundleError) as error:
        conditions_asked(covariates, label, BOTH, scale)
    assert all(word in str(error.value) for word in words), error.value
