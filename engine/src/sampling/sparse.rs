//! Choosing from a row of which only some tokens are known: the likeliest ones and a few that were asked
//! for by id, as engines behind a URL return them. What comes out is what [`super::pick`] chooses from the
//! whole row, or a list of what must be known first: each token that is not in the row has at most the
//! least score of the likeliest ones, and its noise is known before the row is, so those that could still
//! win can be named.

use tandem_proto::message::{Alternative, SamplingParams};

use super::{BAR_MARGIN, Before, Pick, Touch, check_params, noise, touched};
use crate::constraint::TokenMask;
use crate::error::EngineError;

/// Most tokens that one [`SparseChoice::NeedMore`] names.
pub const NEEDED_IDS_MAX: usize = 1024;

/// Engines write a large negative number where a token is impossible (vLLM: −9999); below this it is one.
const IMPOSSIBLE: f32 = -9000.0;

/// Mass by which the sums behind top-p may be off: llama-server's logprobs of one row differ by 5·10⁻⁵ with how many
/// are asked for.
const MASS_MARGIN: f64 = 1e-3;

/// Covers the rounding of sums that are made in another order than a whole row's.
const SUM_MARGIN: f64 = 1e-9;

/// What is known of one position's distribution: natural logarithms of probabilities of the model's own
/// distribution (no temperature, penalties or masks).
#[derive(Clone, Debug, PartialEq)]
pub struct SparseRow {
    /// Likeliest first, ties to the lower id.
    known: Vec<(u32, f32)>,
    /// No token that is not in `known` is likelier.
    floor: f32,
    vocabulary: usize,
    /// All of the mass is the vocabulary's: the engine's head has no padding.
    is_unpadded: bool,
}

/// What a sparse row says.
#[derive(Clone, Debug, PartialEq)]
pub enum SparseChoice {
    /// The choice that the whole row would give.
    Chosen(Pick),
    /// It depends on tokens that are not in the row.
    NeedMore {
        /// Those that could be chosen, at most [`NEEDED_IDS_MAX`]; empty if top-k or top-p needs more of the
        /// likeliest tokens instead.
        ids: Vec<u32>,
        /// True if these are all: with them, the row decides.
        decides: bool,
    },
}

impl SparseRow {
    /// A row of a vocabulary of `vocabulary` tokens. `top` are the likeliest ones, in any order and complete: no
    /// other is likelier than any of them. `named` are others. The engine's head has `head_rows` rows: ids outside
    /// the vocabulary are its padding and never chosen.
    ///
    /// # Errors
    /// [`EngineError::NotFinite`] for NaN or +∞, [`EngineError::Shape`] for a row without tokens.
    pub fn new(
        top: &[(u32, f32)],
        named: &[(u32, f32)],
        vocabulary: usize,
        head_rows: usize,
    ) -> Result<Self, EngineError> {
        let all = || top.iter().chain(named);
        if let Some(&(token, value)) = all().find(|(_, v)| v.is_nan() || *v == f32::INFINITY) {
            return Err(EngineError::NotFinite { token: token as usize, value });
        }
        let mut known: Vec<(u32, f32)> = all().copied().filter(|(id, _)| (*id as usize) < vocabulary).collect();
        known.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
        known.dedup_by_key(|(id, _)| *id);
        for (_, logprob) in &mut known {
            if *logprob <= IMPOSSIBLE {
                *logprob = f32::NEG_INFINITY;
            }
        }
        known.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if known.is_empty() {
            return Err(EngineError::Shape("a row without tokens of the vocabulary".into()));
        }
        let floor = top.iter().map(|&(_, v)| v).fold(f32::INFINITY, f32::min);
        let floor = if known.len() == vocabulary || floor <= IMPOSSIBLE { f32::NEG_INFINITY } else { floor };
        Ok(Self { known, floor, vocabulary, is_unpadded: head_rows == vocabulary })
    }

    /// The `k` likeliest tokens, as far as they are known.
    #[must_use]
    pub fn top_alternatives(&self, k: usize) -> Vec<Alternative> {
        let sure = self.known.iter().filter(|(_, v)| *v >= self.floor && v.is_finite());
        sure.take(k).map(|&(id, logprob)| Alternative { id, logprob }).collect()
    }

    /// With more tokens known by name.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_named(&self, named: &[(u32, f32)]) -> Result<Self, EngineError> {
        let row = Self::new(&self.known, named, self.vocabulary, self.vocabulary)?;
        let floor = if row.known.len() == self.vocabulary { row.floor } else { self.floor };
        Ok(Self { floor, is_unpadded: self.is_unpadded, ..row })
    }
}

/// The `count` tokens with the largest noise at a position, largest first: whichever of them is likely enough is
/// chosen there, so an engine is asked for their logprobs in advance.
#[must_use]
pub fn noisiest(seed: u64, position: u32, vocabulary: usize, count: usize) -> Vec<u32> {
    let noise = noise::Noise::new(seed, position);
    let mut all: Vec<(f64, u32)> = (0..vocabulary as u32).map(|v| (noise.uniform(v), v)).collect();
    let count = count.min(all.len());
    let order = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if count == 0 {
        return Vec::new();
    }
    if count < all.len() {
        all.select_nth_unstable_by(count - 1, order);
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all.into_iter().map(|(_, id)| id).collect()
}

/// Chooses the token at `position` as [`super::pick`] does from the whole row, if what is known decides it.
/// Scores are logprobs: a repetition penalty, which looks at the sign, multiplies them all (a whole row's logits
/// may be positive, so the two differ there and only there).
///
/// # Errors
/// As [`super::pick`].
pub fn choose(
    row: &SparseRow,
    allowed: Option<&TokenMask>,
    params: &SamplingParams,
    before: Before<'_>,
    position: u32,
) -> Result<SparseChoice, EngineError> {
    check_params(params)?;
    let scores = Scores::new(row, allowed, params, before);
    Ok(if params.temperature == 0.0 { scores.greedy() } else { scores.draw(position) })
}

/// A row after bias, penalties and the grammar's mask.
struct Scores<'a> {
    row: &'a SparseRow,
    params: &'a SamplingParams,
    allowed: Option<&'a TokenMask>,
    /// Tokens that may be chosen: id, score, logprob; largest score first, ties to the lower id.
    order: Vec<(u32, f32, f32)>,
    touched: Vec<Touch>,
    /// Ids in the row, ascending.
    ids: Vec<u32>,
}

impl<'a> Scores<'a> {
    fn new(row: &'a SparseRow, allowed: Option<&'a TokenMask>, params: &'a SamplingParams, before: Before<'_>) -> Self {
        let touched = touched(params, before);
        let score = |id: u32, logprob: f32| match touched.binary_search_by_key(&id, |t| t.token) {
            Ok(at) => touched[at].apply(logprob, params),
            Err(_) => logprob,
        };
        let may = |id: u32| allowed.is_none_or(|mask| mask.allows(id));
        let known = row.known.iter().filter(|&&(id, logprob)| logprob > f32::NEG_INFINITY && may(id));
        let mut order: Vec<_> = known.map(|&(id, logprob)| (id, score(id, logprob), logprob)).collect();
        order.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut ids: Vec<u32> = row.known.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        Self { row, params, allowed, order, touched, ids }
    }

    /// The tokens that are not known and may be chosen, ascending, with the most that their score can be.
    fn unknown(&self) -> impl Iterator<Item = (u32, f32)> {
        let (mut known, mut touched) = (self.ids.iter().peekable(), self.touched.iter().peekable());
        let whole = self.row.floor == f32::NEG_INFINITY;
        let end = if whole { 0 } else { self.row.vocabulary as u32 };
        (0..end).filter_map(move |id| {
            if known.next_if_eq(&&id).is_some() || self.allowed.is_some_and(|mask| !mask.allows(id)) {
                return None;
            }
            while touched.next_if(|t| t.token < id).is_some() {}
            let most = touched.next_if(|t| t.token == id).map(|t| t.apply(self.row.floor, self.params));
            Some((id, most.unwrap_or(self.row.floor)))
        })
    }

    fn chosen(&self, at: usize) -> SparseChoice {
        let (token, _, logprob) = self.order[at];
        SparseChoice::Chosen(Pick { token, logprob })
    }

    /// The first tokens of `unknown` that `could` win.
    fn need(&self, could: impl Fn(u32, f32) -> bool) -> Option<SparseChoice> {
        let mut ids = self.unknown().filter(|&(id, most)| could(id, most)).map(|(id, _)| id);
        let named: Vec<u32> = ids.by_ref().take(NEEDED_IDS_MAX).collect();
        let decides = ids.next().is_none();
        (!named.is_empty()).then_some(SparseChoice::NeedMore { ids: named, decides })
    }

    fn more_of_the_likeliest() -> SparseChoice {
        SparseChoice::NeedMore { ids: Vec::new(), decides: false }
    }

    /// Where no token is known that may be chosen, any other may.
    fn nothing_known(&self) -> SparseChoice {
        self.need(|_, _| true).unwrap_or_else(Self::more_of_the_likeliest)
    }

    fn greedy(&self) -> SparseChoice {
        let Some(&(best, score, _)) = self.order.first() else { return self.nothing_known() };
        let could = |id: u32, most: f32| most > score || (most == score && id < best);
        self.need(could).unwrap_or_else(|| self.chosen(0))
    }

    fn draw(&self, position: u32) -> SparseChoice {
        let Some(&(_, top, _)) = self.order.first() else { return self.nothing_known() };
        let most = self.unknown().map(|(_, most)| most).fold(f32::NEG_INFINITY, f32::max);
        if self.params.min_p > 0.0 && most > top {
            // Min-p is a share of the likeliest token's probability, which must be known.
            return self.need(|_, most| most > top).unwrap_or_else(Self::more_of_the_likeliest);
        }
        let Running { surely, perhaps } = self.running(most, top);
        let temperature = f64::from(self.params.temperature);
        let min_p = f64::from(self.params.min_p);
        let stays = |score: f32| min_p <= 0.0 || weight(score, top, temperature) >= min_p;
        let noise = noise::Noise::new(self.params.seed, position);
        let mut best: Option<(usize, f64)> = None;
        for (at, &(id, score, _)) in self.order[..perhaps.unwrap_or(self.order.len())].iter().enumerate() {
            let value = f64::from(score) / temperature + noise.gumbel(id);
            let ahead = |(other, most): (usize, f64)| value > most || (value == most && id < self.order[other].0);
            if stays(score) && best.is_none_or(ahead) {
                best = Some((at, value));
            }
        }
        let Some((at, value)) = best else { return self.nothing_known() };
        if at >= surely {
            return Self::more_of_the_likeliest();
        }
        if perhaps.is_some() {
            return self.chosen(at);
        }
        let could = |id: u32, most: f32| {
            let tempered = f64::from(most) / temperature;
            let noise = noise.gumbel_above(id, value - tempered - BAR_MARGIN);
            stays(most) && noise.is_some_and(|g| tempered + g >= value)
        };
        match self.need(could) {
            // Ranks are known of the likeliest tokens only.
            Some(_) if self.params.top_p < 1.0 || self.params.top_k > 0 => Self::more_of_the_likeliest(),
            Some(need) => need,
            None => self.chosen(at),
        }
    }

    /// What top-k and top-p leave in the running. No unknown token scores more than `most`.
    fn running(&self, most: f32, top: f32) -> Running {
        let p = self.params;
        let whole = self.row.floor == f32::NEG_INFINITY;
        let top_k = if p.top_k == 0 { usize::MAX } else { p.top_k as usize };
        // These masks go by rank, and beyond here an unknown token may come in between.
        let ranked = if whole { self.order.len() } else { self.order.iter().take_while(|o| o.1 > most).count() };
        let all = Running {
            surely: top_k.min(if top_k >= self.row.vocabulary { self.order.len() } else { ranked }),
            perhaps: (top_k <= ranked || whole).then_some(top_k.min(ranked)),
        };
        if p.top_p >= 1.0 {
            return all;
        }
        let temperature = f64::from(p.temperature);
        let share = f64::from(p.top_p);
        let known = |count: usize| self.order[..count].iter().map(|o| weight(o.1, top, temperature)).sum::<f64>();
        // With top-k the share is one of what that leaves, else of all tokens.
        let (least, most) = match all.perhaps {
            Some(count) => (share * known(count), share * known(count)),
            None => {
                let (least, most) =
                    if p.top_k == 0 { self.unknown_weight(top) } else { (0.0, self.unknown_weight(top).1) };
                let total = known(self.order.len());
                let floor = if p.top_k == 0 { total + least } else { known(all.surely) };
                (share * floor * (1.0 - SUM_MARGIN), share * (total + most) * (1.0 + SUM_MARGIN))
            }
        };
        let reach = |goal: f64| {
            let mut sum = 0.0;
            let short = |o: &&(u32, f32, f32)| {
                let more = sum < goal;
                sum += weight(o.1, top, temperature);
                more
            };
            let count = self.order[..ranked].iter().take_while(short).count();
            (count, sum >= goal)
        };
        let ((surely, _), (perhaps, reached)) = (reach(least), reach(most));
        let limit = all.perhaps.unwrap_or(usize::MAX);
        Running {
            // The likeliest token stays whatever the share, if it is known which one that is.
            surely: surely.min(top_k).max(ranked.min(1)),
            perhaps: if reached { Some(perhaps.min(limit).max(1)) } else { all.perhaps.map(|count| count.max(1)) },
        }
    }

    /// The least and the most that all unknown tokens weigh together, the likeliest one as the unit. Those that
    /// nothing touches share the mass that the known ones leave: raised to 1/T, it is least where it is spread evenly
    /// and most where it is in as few tokens as the floor allows (T ≤ 1), and the other way round (T > 1).
    fn unknown_weight(&self, top: f32) -> (f64, f64) {
        let temperature = f64::from(self.params.temperature);
        let known: f64 = self.row.known.iter().map(|&(_, v)| libm::exp(f64::from(v))).sum();
        let mass = (1.0 - known).max(0.0);
        let (mut untouched, mut touched_weight) = (0.0, 0.0);
        for (_, most) in self.unknown() {
            if most == self.row.floor {
                untouched += 1.0;
            } else {
                touched_weight += weight(most, top, temperature);
            }
        }
        if untouched == 0.0 {
            return (0.0, touched_weight);
        }
        let power = 1.0 / temperature;
        let unit = libm::exp(-f64::from(top) * power);
        let even = |mass: f64| libm::pow(untouched, 1.0 - power) * libm::pow(mass, power);
        let dense = |mass: f64| mass * libm::exp(f64::from(self.row.floor) * (power - 1.0));
        let (least, most) = ((mass - MASS_MARGIN).max(0.0), mass + MASS_MARGIN);
        let (least, most) = if temperature <= 1.0 { (even(least), dense(most)) } else { (dense(least), even(most)) };
        // Tokens that a penalty or a mask takes out of the mass may have all of it.
        let sure = self.touched.is_empty() && self.allowed.is_none() && self.row.is_unpadded;
        let most = (most * unit).min(untouched * weight(self.row.floor, top, temperature));
        (if sure { least * unit } else { 0.0 }, touched_weight + most)
    }
}

/// What top-k and top-p leave of a row.
struct Running {
    /// So many of the known tokens, from the first on, are left.
    surely: usize,
    /// No token behind so many is; none if unknown ones may be left, too.
    perhaps: Option<usize>,
}

/// Probability of a score before normalisation, the likeliest one's as the unit.
fn weight(score: f32, top: f32, temperature: f64) -> f64 {
    libm::exp(f64::from(score - top) / temperature)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{largest, log_sum_exp, pick};
    use super::*;

    /// A row as an engine would return it: normalised, and of it the `top` likeliest tokens and the named ones.
    fn rows(logits: &[f32], top: usize, named: &[u32]) -> (Vec<f32>, SparseRow) {
        let norm = log_sum_exp(logits);
        let whole: Vec<f32> = logits.iter().map(|v| v - norm).collect();
        let at = |ids: &[u32]| ids.iter().map(|&id| (id, whole[id as usize])).collect::<Vec<_>>();
        let sparse = SparseRow::new(&at(&largest(&whole, top)), &at(named), whole.len(), whole.len()).expect("a row");
        (whole, sparse)
    }

    fn params() -> impl Strategy<Value = SamplingParams> {
        let temperature = prop_oneof![Just(0.0f32), Just(0.3), Just(0.7), Just(1.0), Just(1.6)];
        let top_p = prop_oneof![3 => Just(1.0f32), 1 => Just(0.9), 1 => Just(0.5)];
        let top_k = prop_oneof![3 => Just(0u32), 1 => 1u32..12, 1 => Just(500)];
        let min_p = prop_oneof![3 => Just(0.0f32), 1 => Just(0.05), 1 => Just(0.4)];
        let penalty = prop_oneof![3 => Just(0.0f32), 1 => -2.0f32..2.0];
        let repetition = prop_oneof![3 => Just(1.0f32), 1 => 0.5f32..2.0];
        let bias = prop::collection::vec((0u32..130, -8.0f32..8.0), 0..3);
        let seed = 0u64..1000;
        (temperature, top_p, top_k, min_p, (penalty.clone(), penalty), repetition, bias, seed).prop_map(
            |(
                temperature,
                top_p,
                top_k,
                min_p,
                (presence_penalty, frequency_penalty),
                repetition_penalty,
                logit_bias,
                seed,
            )| {
                SamplingParams {
                    temperature,
                    top_p,
                    top_k,
                    min_p,
                    presence_penalty,
                    frequency_penalty,
                    repetition_penalty,
                    logit_bias,
                    seed,
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// What a sparse row decides is what the whole row does; what it does not decide, it does with the tokens
        /// that it names; and with every token it always decides.
        #[test]
        fn a_choice_from_a_part_is_the_choice_from_the_whole(
            logits in prop::collection::vec(prop_oneof![4 => -12.0f32..0.0, 1 => -2.0f32..6.0], 120),
            params in params(),
            top in 1usize..24,
            noisy in 0usize..24,
            answer in prop::collection::vec(0u32..125, 0..6),
            forbidden in prop::option::of(prop::collection::vec(0u32..120, 0..110)),
            position in 0u32..1000,
        ) {
            let named = noisiest(params.seed, position, 120, noisy);
            let (whole, sparse) = rows(&logits, top, &named);
            let mask = forbidden.map(|out| {
                let mut mask = TokenMask::all(120);
                out.iter().for_each(|&id| mask.set(id, false));
                mask
            }).filter(|mask| mask.count() > 0);
            let before = Before { prompt: &[1, 2, 3], answer: &answer };
            let expected = pick(&whole, mask.as_ref(), &params, before, position).expect("finite").token;
            let choose = |row: &SparseRow| choose(row, mask.as_ref(), &params, before, position).expect("in range");
            match choose(&sparse) {
                SparseChoice::Chosen(pick) => prop_assert_eq!(pick.token, expected),
                SparseChoice::NeedMore { ids, decides } if decides => {
                    let named: Vec<_> = ids.iter().map(|&id| (id, whole[id as usize])).collect();
                    let more = sparse.with_named(&named).expect("a row");
                    match choose(&more) {
                        SparseChoice::Chosen(pick) => prop_assert_eq!(pick.token, expected),
                        // The likeliest token that may be chosen is known now, and with it min-p's bar.
                        SparseChoice::NeedMore { ids, .. } => prop_assert!(params.min_p > 0.0, "{ids:?} after {named:?}"),
                    }
                }
                SparseChoice::NeedMore { .. } => {}
            }
            let (_, all) = rows(&logits, 120, &[]);
            let SparseChoice::Chosen(pick) = choose(&all) else { panic!("the whole row does not decide") };
            prop_assert_eq!(pick.token, expected);
        }
    }

    #[test]
    fn what_is_not_known_can_matter() {
        // Two tokens share the lead; the row shows the one with the higher id.
        let row = SparseRow::new(&[(7, -1.0)], &[], 10, 12).expect("a row");
        let greedy = SamplingParams::default();
        let need = choose(&row, None, &greedy, Before::default(), 0).expect("in range");
        assert_eq!(need, SparseChoice::NeedMore { ids: (0..7).collect(), decides: true });
        let row = SparseRow::new(&[(7, -1.0), (3, -1.5)], &[], 10, 12).expect("a row");
        let pick = choose(&row, None, &greedy, Before::default(), 0).expect("in range");
        assert_eq!(pick, SparseChoice::Chosen(Pick { token: 7, logprob: -1.0 }));
        // A bias may lift a token that is not there over it.
        let bias = SamplingParams { logit_bias: vec![(5, 1.0)], ..SamplingParams::default() };
        let need = choose(&row, None, &bias, Before::default(), 0).expect("in range");
        assert_eq!(need, SparseChoice::NeedMore { ids: vec![5], decides: true });
        // Top-p of 0.9 with 0.59 known: more of the likeliest tokens are wanted.
        let nucleus = SamplingParams { temperature: 1.0, top_p: 0.9, ..SamplingParams::default() };
        let need = choose(&row, None, &nucleus, Before::default(), 0).expect("in range");
        assert_eq!(need, SparseChoice::NeedMore { ids: Vec::new(), decides: false });
        // Padding of the head is never chosen, and what engines write for impossible is not either.
        let row = SparseRow::new(&[(11, -0.1), (4, -2.5), (2, -9999.0)], &[], 10, 12).expect("a row");
        let pick = choose(&row, None, &greedy, Before::default(), 0).expect("in range");
        assert_eq!(pick, SparseChoice::Chosen(Pick { token: 4, logprob: -2.5 }));
        assert!(
            SparseRow::new(&[(11, -0.1)], &[], 10, 12).is_err()
                && SparseRow::new(&[(1, f32::NAN)], &[], 10, 12).is_err()
        );
    }

    #[test]
    fn the_noisiest_tokens_are_those_with_the_largest_noise() {
        let all = noisiest(5, 9, 3000, 3000);
        let noise = |id: u32| noise::gumbel(5, 9, id);
        assert!(all.windows(2).all(|w| noise(w[0]) >= noise(w[1])));
        assert_eq!(noisiest(5, 9, 3000, 17), all[..17]);
    }
}
