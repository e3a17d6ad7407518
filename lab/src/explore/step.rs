//! Batched steps of both models over one group of prompts.

use tandem_engine::sampling::argmax;
use tandem_engine::{Hidden, KvPool, Rows, Sequence, uncertainty};
use tandem_proto::limits::KV_BLOCK_TOKENS;

use super::Node;
use crate::error::LabError;
use crate::pair::Pair;

/// Rows of one pass at most.
const ROWS: usize = 2048;

/// State of one prompt: which tokens were fed, and the KV of the trunk and of what lies above it.
struct State {
    fed: Vec<u32>,
    trunk: Sequence,
    edge: Sequence,
    cloud: Sequence,
}

/// KV state of a group of prompts.
pub(super) struct Group {
    trunk: KvPool,
    edge: KvPool,
    cloud: KvPool,
    states: Vec<State>,
}

/// One model's hidden states above its last layer.
fn upper(
    model: &tandem_engine::Model,
    pool: &mut KvPool,
    mut items: Vec<Rows<'_>>,
    hidden: Hidden,
) -> Result<Hidden, LabError> {
    let layers = pool.layers();
    Ok(model.layers(layers, pool, &mut items, hidden)?)
}

impl Group {
    /// Room for sequences of these lengths.
    pub(super) fn new(pair: &Pair, lengths: impl Iterator<Item = usize> + Clone) -> Result<Self, LabError> {
        let blocks = lengths.clone().map(|n| n.div_ceil(KV_BLOCK_TOKENS)).sum();
        let trunk = KvPool::new(pair.cloud.kv_layout(), 0..pair.trunk, blocks)?;
        let edge = KvPool::new(pair.edge.kv_layout(), pair.trunk..pair.edge.spec().layers, blocks)?;
        let cloud = KvPool::new(pair.cloud.kv_layout(), pair.trunk..pair.cloud.spec().layers, blocks)?;
        let state =
            |_| State { fed: Vec::new(), trunk: trunk.sequence(), edge: edge.sequence(), cloud: cloud.sequence() };
        let states = lengths.map(state).collect();
        Ok(Self { trunk, edge, cloud, states })
    }

    /// What the models say after each context; contexts are (member, tokens), members rising.
    pub(super) fn feed(&mut self, pair: &Pair, contexts: &[(usize, Vec<u32>)]) -> Result<Vec<Node>, LabError> {
        let mut out = Vec::with_capacity(contexts.len());
        let mut rest = contexts;
        while !rest.is_empty() {
            let (mut rows, mut take) = (0, 0);
            while take < rest.len() && (take == 0 || rows + self.new_rows(&rest[take]) <= ROWS) {
                rows += self.new_rows(&rest[take]);
                take += 1;
            }
            let (now, later) = rest.split_at(take);
            out.extend(self.pass(pair, now)?);
            rest = later;
        }
        Ok(out)
    }

    /// Tokens of a context whose state is there already; the last one is always fed.
    fn kept(&self, (member, tokens): &(usize, Vec<u32>)) -> usize {
        let fed = &self.states[*member].fed;
        fed.iter().zip(tokens).take_while(|(a, b)| a == b).count().min(tokens.len() - 1)
    }

    fn new_rows(&self, context: &(usize, Vec<u32>)) -> usize {
        context.1.len() - self.kept(context)
    }

    fn pass(&mut self, pair: &Pair, contexts: &[(usize, Vec<u32>)]) -> Result<Vec<Node>, LabError> {
        let kept: Vec<usize> = contexts.iter().map(|c| self.kept(c)).collect();
        let counts: Vec<usize> = contexts.iter().zip(&kept).map(|((_, t), kept)| t.len() - kept).collect();
        let tokens: Vec<u32> = contexts.iter().zip(&kept).flat_map(|((_, t), &kept)| t[kept..].to_vec()).collect();
        let mut trunk = Vec::with_capacity(contexts.len());
        let (mut edge, mut cloud) = (Vec::with_capacity(contexts.len()), Vec::with_capacity(contexts.len()));
        let mut members = contexts.iter().zip(&kept).zip(&counts).peekable();
        for (i, state) in self.states.iter_mut().enumerate() {
            let Some(((context, &kept), &rows)) = members.next_if(|((c, _), _)| c.0 == i) else { continue };
            for seq in [&mut state.trunk, &mut state.edge, &mut state.cloud] {
                seq.truncate(kept);
            }
            state.fed.clone_from(&context.1);
            trunk.push(Rows { seq: &mut state.trunk, rows });
            edge.push(Rows { seq: &mut state.edge, rows });
            cloud.push(Rows { seq: &mut state.cloud, rows });
        }
        let shared = upper(&pair.cloud, &mut self.trunk, trunk, pair.cloud.embed(&tokens)?)?;
        let below_edge = if pair.trunk > 0 { shared.clone() } else { pair.edge.embed(&tokens)? };
        let edge = upper(&pair.edge, &mut self.edge, edge, below_edge)?;
        let cloud = upper(&pair.cloud, &mut self.cloud, cloud, shared)?;
        let last: Vec<usize> = counts
            .iter()
            .scan(0, |end, rows| {
                *end += rows;
                Some(*end - 1)
            })
            .collect();
        let (edge_logits, cloud_logits) = (pair.edge.head(&edge, &last)?, pair.cloud.head(&cloud, &last)?);
        let mut nodes = Vec::with_capacity(contexts.len());
        for (at, row) in last.into_iter().enumerate() {
            let of_edge = uncertainty::measure(edge_logits.row(at).unwrap_or_default())?;
            nodes.push(Node {
                edge: of_edge.top1,
                cloud: argmax(cloud_logits.row(at).unwrap_or_default()),
                depth: 0,
                entropy: of_edge.entropy,
                top1: of_edge.top1_probability,
                margin: of_edge.margin_probability,
                logit_margin: of_edge.margin_logit,
                hidden: edge.row(row).unwrap_or_default().to_vec(),
                children: Vec::new(),
                after: None,
            });
        }
        Ok(nodes)
    }
}
