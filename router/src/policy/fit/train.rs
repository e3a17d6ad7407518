//! Mini-batch Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019)
//! on the logistic loss.

use super::{FitConfig, FitError, Network};
use crate::policy::{
    calibrated::{dot, sigmoid},
    random::{splitmix64, unit},
};

/// Rows of standardised inputs.
pub(super) struct Matrix {
    pub(super) data: Vec<f32>,
    pub(super) columns: usize,
}

impl Matrix {
    pub(super) fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.columns)
    }

    fn row(&self, at: usize) -> &[f32] {
        &self.data[at * self.columns..(at + 1) * self.columns]
    }
}

/// A stream of random numbers from a counter.
struct Stream {
    key: u64,
    next: u64,
}

impl Stream {
    fn next(&mut self) -> u64 {
        self.next += 1;
        splitmix64(self.key ^ splitmix64(self.next))
    }

    /// Uniform in −bound..bound.
    fn symmetric(&mut self, bound: f32) -> f32 {
        (2.0 * unit(self.next()) - 1.0) * bound
    }

    /// Fisher–Yates.
    fn shuffle(&mut self, order: &mut [u32]) {
        for last in (1..order.len()).rev() {
            // 64 random bits against at most 2^32 rows: the bias is below 2^-32.
            let other = (self.next() % (last as u64 + 1)) as usize;
            order.swap(last, other);
        }
    }
}

/// A network as one vector: the rows of W, b, the output weights, the output bias. Without hidden
/// units: the weights and the bias.
struct Parameters {
    units: Option<usize>,
    inputs: usize,
    values: Vec<f32>,
}

impl Parameters {
    fn start(units: Option<usize>, inputs: usize, stream: &mut Stream) -> Self {
        let Some(units) = units else {
            return Self { units: None, inputs, values: vec![0.0; inputs + 1] };
        };
        // He's bound for ReLU; small output weights start near the base rate.
        let bound = (6.0 / inputs as f32).sqrt();
        let mut values: Vec<f32> = (0..units * inputs).map(|_| stream.symmetric(bound)).collect();
        values.extend(std::iter::repeat_n(0.0, units));
        let output = (1.0 / units as f32).sqrt();
        values.extend((0..units).map(|_| stream.symmetric(output)));
        values.push(0.0);
        Self { units: Some(units), inputs, values }
    }

    /// Parameters that decay: the weights on inputs, not the biases.
    fn decaying(&self) -> usize {
        self.units.unwrap_or(1) * self.inputs
    }

    fn network(&self) -> Network {
        let values = &self.values;
        let Some(units) = self.units else {
            return Network::Logistic { weights: values[..self.inputs].to_vec(), bias: values[self.inputs] };
        };
        let (weights, rest) = values.split_at(units * self.inputs);
        Network::Mlp {
            units,
            weights: weights.to_vec(),
            biases: rest[..units].to_vec(),
            output: rest[units..2 * units].to_vec(),
            output_bias: rest[2 * units],
        }
    }

    /// Adds the gradient of one sample's loss to `gradient`; `hidden` is scratch of one per unit.
    fn backward(&self, x: &[f32], label: bool, hidden: &mut [f32], gradient: &mut [f32]) {
        let target = f32::from(u8::from(label));
        let Some(units) = self.units else {
            let z = dot(&self.values[..self.inputs], x) + self.values[self.inputs];
            let error = sigmoid(z) - target;
            add_scaled(&mut gradient[..self.inputs], x, error);
            gradient[self.inputs] += error;
            return;
        };
        let (weights, rest) = self.values.split_at(units * self.inputs);
        let (biases, output) = rest.split_at(units);
        for ((h, row), bias) in hidden.iter_mut().zip(weights.chunks_exact(self.inputs)).zip(biases) {
            *h = (dot(row, x) + bias).max(0.0);
        }
        let error = sigmoid(dot(&output[..units], hidden) + output[units]) - target;
        let (weight_gradient, rest) = gradient.split_at_mut(units * self.inputs);
        let (bias_gradient, output_gradient) = rest.split_at_mut(units);
        for (unit, row) in weight_gradient.chunks_exact_mut(self.inputs).enumerate() {
            let h = hidden[unit];
            output_gradient[unit] += error * h;
            if h > 0.0 {
                let through = error * output[unit];
                bias_gradient[unit] += through;
                add_scaled(row, x, through);
            }
        }
        output_gradient[units] += error;
    }
}

fn add_scaled(to: &mut [f32], x: &[f32], factor: f32) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += factor * x;
    }
}

struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    step: i32,
    /// Steps of the whole training: the rate falls to 0 over them along a half cosine (Loshchilov
    /// and Hutter 2017), so that the last epochs settle instead of wandering.
    steps: i32,
}

impl Adam {
    fn update(&mut self, parameters: &mut Parameters, gradient: &[f32], scale: f32, config: &FitConfig) {
        const BETA1: f32 = 0.9;
        const BETA2: f32 = 0.999;
        const EPSILON: f32 = 1e-8;
        self.step = self.step.saturating_add(1);
        let done = self.step as f32 / self.steps.max(1) as f32;
        let learning_rate = config.learning_rate * 0.5 * (1.0 + (std::f32::consts::PI * done.min(1.0)).cos());
        let rate = learning_rate * (1.0 - BETA2.powi(self.step)).sqrt() / (1.0 - BETA1.powi(self.step));
        let decaying = parameters.decaying();
        let decay = 1.0 - learning_rate * config.weight_decay;
        parameters.values[..decaying].iter_mut().for_each(|value| *value *= decay);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, gradient), (first, second)) in parameters.values.iter_mut().zip(gradient).zip(moments) {
            let gradient = gradient * scale;
            *first = BETA1 * *first + (1.0 - BETA1) * gradient;
            *second = BETA2 * *second + (1.0 - BETA2) * gradient * gradient;
            *value -= rate * *first / (second.sqrt() + EPSILON);
        }
    }
}

/// Mean −ln p(label), nats.
fn log_loss(network: &Network, inputs: &Matrix, labels: &[bool]) -> f32 {
    let losses = inputs.rows().zip(labels).map(|(row, label)| {
        let z = f64::from(network.logit(row));
        // ln(1 + e^∓z) without overflow.
        let wrong_way = if *label { -z } else { z };
        wrong_way.max(0.0) + (-wrong_way.abs()).exp().ln_1p()
    });
    (losses.sum::<f64>() / labels.len().max(1) as f64) as f32
}

/// Trains on `inputs`, and keeps the epoch with the least loss on `held`. Returns the network, its
/// epoch and that loss.
pub(super) fn train(
    inputs: &Matrix,
    labels: &[bool],
    held: &Matrix,
    held_labels: &[bool],
    config: &FitConfig,
) -> Result<(Network, usize, f32), FitError> {
    let mut stream = Stream { key: splitmix64(config.seed), next: 0 };
    let mut parameters = Parameters::start(config.units, inputs.columns, &mut stream);
    let size = parameters.values.len();
    let steps = config.epochs.saturating_mul(labels.len().div_ceil(config.batch.max(1)));
    let steps = i32::try_from(steps).unwrap_or(i32::MAX);
    let mut adam = Adam { first: vec![0.0; size], second: vec![0.0; size], step: 0, steps };
    let mut gradient = vec![0.0; size];
    let mut hidden = vec![0.0; config.units.unwrap_or(0)];
    let mut order: Vec<u32> = (0..labels.len() as u32).collect();
    let mut best: Option<(Network, usize, f32)> = None;
    for epoch in 0..config.epochs {
        stream.shuffle(&mut order);
        for batch in order.chunks(config.batch) {
            gradient.fill(0.0);
            for &at in batch {
                parameters.backward(inputs.row(at as usize), labels[at as usize], &mut hidden, &mut gradient);
            }
            adam.update(&mut parameters, &gradient, 1.0 / batch.len() as f32, config);
        }
        let network = parameters.network();
        let loss = log_loss(&network, held, held_labels);
        if loss.is_finite() && best.as_ref().is_none_or(|(_, _, least)| loss < *least) {
            best = Some((network, epoch, loss));
        }
    }
    best.ok_or(FitError::Diverged)
}
