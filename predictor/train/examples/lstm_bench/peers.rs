//! What the kernels are measured beside: Burn's backends, onnxruntime, and callgrind's count.

use crate::{BATCH, BATCH_ALL, Candidate, Result, STEP_ALL, clock};
use burn::tensor::Tensor;
use prestage_predictor::lstm::weights::PARTS;
use prestage_predictor::lstm::{HIDDEN, Lead, SYMBOLS, State, Token, Weights};
use prestage_train::network::Carry;
use prestage_train::{Backend, Network};
use std::cell::RefCell;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;

/// Steps of Burn's forward pass, without autodiff.
pub(crate) fn burn<'a>(weights: &Weights, backend: Backend, sample: &'a [Token]) -> Vec<Candidate<'a>> {
    [(STEP_ALL, 1), (BATCH_ALL, BATCH)]
        .into_iter()
        .map(|(what, streams)| {
            let device = backend.device();
            let network = Network::new(weights.flat(), &device);
            let empty = Tensor::zeros([streams, HIDDEN], &device);
            let mut carry = Carry { hidden: empty.clone(), cell: empty };
            let mut next = sample.chunks_exact(streams).cycle();
            let run = move |times| {
                Ok(clock(times, streams, || {
                    let tokens = next.next().unwrap_or(sample).to_vec();
                    let (mut hidden, carried) = network.forward(&[tokens], carry.clone());
                    carry = carried;
                    black_box(hidden.pop().map(|hidden| network.logits(hidden).into_data()));
                }))
            };
            Candidate { what, name: format!("burn-{}", backend.name()), run: Box::new(run) }
        })
        .collect()
}

/// benches/lstm_onnx.py under way.
pub(crate) struct Onnx {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    _folder: tempfile::TempDir,
    version: String,
}

impl Onnx {
    /// Starts it and checks that it computes what the kernels compute.
    pub(crate) fn start(python: &str, weights: &Weights, sample: &[Token]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (flat, shapes) = (folder.path().join("parts.f32"), folder.path().join("shapes.json"));
        std::fs::write(&flat, weights.flat().iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())?;
        std::fs::write(&shapes, serde_json::json!(PARTS.map(|part| (part.name, part.rows, part.columns))).to_string())?;
        let mut child = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/lstm_onnx.py"))
            .args([flat, shapes])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{python}: {error}"))?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("no pipes to the Python process".into());
        };
        let mut onnx =
            Self { child, requests, answers: BufReader::new(answers), _folder: folder, version: String::new() };
        let tokens = &sample[..20];
        let asked = tokens.iter().map(|token| token.bits().to_string()).collect::<Vec<_>>().join(" ");
        let answer = onnx.ask(&format!("check {asked}"))?;
        onnx.version = answer["version"].as_str().unwrap_or_default().to_owned();
        let mut state = State::default();
        for token in tokens {
            weights.step(&mut state, *token);
        }
        let found = answer["logits"].as_array().map(Vec::as_slice).unwrap_or_default();
        for (lead, found) in Lead::ALL.into_iter().zip(found.chunks(SYMBOLS)) {
            let mut expected = [0.0; SYMBOLS];
            weights.logits(&state, lead, &mut expected);
            for (expected, found) in expected.iter().zip(found) {
                let found = found.as_f64().unwrap_or(f64::NAN);
                // not `>`: NaN is refused too
                let near = (found - f64::from(*expected)).abs() <= 1e-4;
                if !near {
                    return Err(format!("it computes another model: {found} for {expected}").into());
                }
            }
        }
        Ok(onnx)
    }

    fn ask(&mut self, request: &str) -> Result<serde_json::Value> {
        writeln!(self.requests, "{request}")?;
        let mut answer = String::new();
        if self.answers.read_line(&mut answer)? == 0 {
            return Err(format!("the Python process ended ({}); see benches/lstm.sh", self.child.wait()?).into());
        }
        Ok(serde_json::from_str(&answer)?)
    }

    pub(crate) fn candidates<'a>(self) -> Vec<Candidate<'a>> {
        let name = format!("onnxruntime {}", self.version);
        let shared = Rc::new(RefCell::new(self));
        [(STEP_ALL, 1), (BATCH_ALL, BATCH)]
            .into_iter()
            .map(|(what, streams)| {
                let onnx = Rc::clone(&shared);
                let run = move |times| {
                    let answer = onnx.borrow_mut().ask(&format!("time {streams} {times}"))?;
                    Ok(answer["ns"].as_f64().ok_or("no time in the answer")? / streams as f64)
                };
                Candidate { what, name: name.clone(), run: Box::new(run) }
            })
            .collect()
    }
}

/// Instructions of a step, as the difference between runs of different length.
pub(crate) fn instructions(path: &str) -> std::result::Result<f64, String> {
    if path == "avx512" {
        return Err("callgrind knows no AVX-512".into());
    }
    let collected = |steps: u32| -> Result<f64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe()?)
            .args(["count", path, &steps.to_string()])
            .output()
            .map_err(|error| format!("valgrind: {error}"))?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        let count = log.lines().find_map(|line| line.split("Collected :").nth(1)).map(str::trim);
        count.filter(|_| output.status.success()).and_then(|count| count.parse().ok()).ok_or(log.into())
    };
    let (short, long) = (collected(1000), collected(3000));
    short.and_then(|short| Ok((long? - short) / 2000.0)).map_err(|error| error.to_string())
}

/// CPU time of this thread.
pub(crate) fn cpu_ns() -> std::result::Result<f64, String> {
    let file = "/proc/thread-self/schedstat";
    let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    text.split_whitespace().next().and_then(|ns| ns.parse().ok()).ok_or(format!("{file}: no CPU time in it"))
}
