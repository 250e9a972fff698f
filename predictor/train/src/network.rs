//! The model as a Burn module.
//!
//! Written for autodiff's costs, which are by operation and by byte: no gate is sliced out of a product (the gradient of
//! a slice is a zeroed copy of the whole), instead the weights are cut by gate once a window and each gate is a product
//! of its own; the input is looked up a step at a time for the same reason; and the heads of all steps are one product.

use crate::corpus::{LANES, WINDOW, Window};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use prestage_predictor::lstm::weights::PARTS;
use prestage_predictor::lstm::{GATES, HIDDEN, INPUT, Lead, SYMBOLS, Token};

/// Which of Burn's backends computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    #[cfg(feature = "ndarray")]
    Ndarray,
    #[cfg(feature = "flex")]
    Flex,
}

#[cfg(not(any(feature = "ndarray", feature = "flex")))]
compile_error!("prestage-train needs one of the features `ndarray` and `flex`");

impl Backend {
    /// Those that were compiled in.
    pub const ALL: &[Self] = &[
        #[cfg(feature = "ndarray")]
        Self::Ndarray,
        #[cfg(feature = "flex")]
        Self::Flex,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(feature = "ndarray")]
            Self::Ndarray => "ndarray",
            #[cfg(feature = "flex")]
            Self::Flex => "flex",
        }
    }

    #[must_use]
    pub fn device(self) -> Device {
        match self {
            #[cfg(feature = "ndarray")]
            #[allow(deprecated)] // gone in Burn 0.23; until then it is the smaller of the two to build
            Self::Ndarray => Device::ndarray(),
            #[cfg(feature = "flex")]
            Self::Flex => Device::flex(),
        }
    }
}

impl Default for Backend {
    fn default() -> Self {
        Self::ALL[0]
    }
}

/// The parts of `prestage_predictor::lstm::weights::PARTS`, each a matrix, in their order.
#[derive(Module, Debug)]
pub struct Network {
    pub(crate) parts: [Param<Tensor<2>>; PARTS.len()],
}

/// What the layer carries from token to token: hidden and cell values, each `[streams, HIDDEN]`.
#[derive(Clone, Debug)]
pub struct Carry {
    pub hidden: Tensor<2>,
    pub cell: Tensor<2>,
}

impl Network {
    /// `flat` are the weights as [`Weights::flat`](prestage_predictor::lstm::Weights::flat) gives them.
    #[must_use]
    pub fn new(flat: &[f32], device: &Device) -> Self {
        let mut rest = flat;
        let parts = PARTS.map(|part| {
            let (values, behind) = rest.split_at(part.len().min(rest.len()));
            rest = behind;
            Param::from_tensor(Tensor::from_data(TensorData::new(values.to_vec(), [part.rows, part.columns]), device))
        });
        Self { parts }
    }

    /// Hidden values after each row of `tokens` (`[streams]` at a time), and what is carried on.
    #[must_use]
    pub fn forward(&self, tokens: &[Vec<Token>], mut carry: Carry) -> (Vec<Tensor<2>>, Carry) {
        let [symbol, op, size, gap, input, recurrent, bias, _, _] = self.parts.each_ref().map(|part| part.val());
        let device = symbol.device();
        let stacked = Tensor::cat(vec![input, recurrent], 0);
        let gates: [(Tensor<2>, Tensor<2>); GATES] = std::array::from_fn(|gate| {
            let columns = |tensor: &Tensor<2>| tensor.clone().narrow(1, gate * HIDDEN, HIDDEN);
            (columns(&stacked), columns(&bias))
        });
        let mut hidden = Vec::with_capacity(tokens.len());
        for tokens in tokens {
            let look_up = |table: &Tensor<2>, ordinal: fn(Token) -> u8| {
                let rows: Vec<i32> = tokens.iter().map(|token| i32::from(ordinal(*token))).collect();
                table.clone().select(0, indices(rows, &device))
            };
            let context = look_up(&op, Token::op) + look_up(&size, Token::size) + look_up(&gap, Token::gap);
            let row = Tensor::cat(vec![look_up(&symbol, Token::symbol), context, carry.hidden], 1);
            let [input, forget, new, output] =
                gates.each_ref().map(|(weights, bias)| row.clone().matmul(weights.clone()) + bias.clone());
            let kept = activation::sigmoid(forget) * carry.cell;
            carry.cell = kept + activation::sigmoid(input) * tanh(new);
            carry.hidden = activation::sigmoid(output) * tanh(carry.cell.clone());
            hidden.push(carry.hidden.clone());
        }
        (hidden, carry)
    }

    /// Logits of hidden values `[rows, HIDDEN]`: `[rows, leads × SYMBOLS]`.
    #[must_use]
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let [.., head, bias] = &self.parts;
        hidden.matmul(head.val()) + bias.val()
    }

    /// Cross-entropy in nats per token, summed over the leads.
    pub(crate) fn loss(&self, window: &Window, carry: Carry) -> (Tensor<1>, Carry) {
        let tokens: Vec<Vec<Token>> = window.inputs.iter().map(|row| row.to_vec()).collect();
        let (hidden, carry) = self.forward(&tokens, carry);
        let logits = self.logits(Tensor::cat(hidden, 0));
        let device = logits.device();
        let rows = WINDOW * LANES * Lead::ALL.len();
        let likely = activation::log_softmax(logits.reshape([rows, SYMBOLS]), 1);
        let targets = indices(window.targets.clone(), &device).reshape([rows, 1]);
        let loss = likely.gather(1, targets).sum().div_scalar(-((WINDOW * LANES) as f32));
        (loss, carry)
    }
}

fn indices(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

fn tanh(x: Tensor<2>) -> Tensor<2> {
    x.tanh()
}

// the row that is multiplied: the layer's input and its own hidden values
const _: () = assert!(PARTS[4].rows == INPUT && PARTS[5].rows == HIDDEN);
