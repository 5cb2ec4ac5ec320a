//! A block for each row: what is adjusted, what is drawn, then log-probabilities. Rows are put in the order of what they need, so that
//! each launch has rows of one kind, and what they say comes back in one copy.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use super::arguments::{Adjustment, AdjustmentLists, LogprobRow, NONE, SampleRow, VOCAB_THREADS};
use super::{Choice, Draw, LogitRow, ReadRow};
use crate::cuda::device::{Launch, launch};
use crate::cuda::memory::{Address, Operand, activations, download, name_of, scratch, upload, write};

const WORD: usize = size_of::<u32>();

// SAFETY: numbers; what lies between them no kernel reads.
unsafe impl DeviceRepr for SampleRow {}
// SAFETY: numbers.
unsafe impl DeviceRepr for Adjustment {}
// SAFETY: addresses.
unsafe impl DeviceRepr for AdjustmentLists {}
// SAFETY: numbers.
unsafe impl DeviceRepr for LogprobRow {}

/// What launches are about, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Drawn,
    /// Drawn from what was adjusted before.
    Adjusted,
    Known,
}

impl Kind {
    fn of(row: &LogitRow) -> Self {
        match &row.choice {
            Choice::Draw(draw) if draw.adjusts() => Self::Adjusted,
            Choice::Draw(_) => Self::Drawn,
            Choice::Known(_) => Self::Known,
        }
    }
}

pub(super) fn read_logits(
    logits: Operand<'_>,
    vocab_size: usize,
    rows: &[LogitRow],
) -> candle_core::Result<Vec<ReadRow>> {
    let device = logits.0.device();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    // Those with log-probabilities come first among their kind.
    order.sort_by_key(|&idx| (Kind::of(&rows[idx]), rows[idx].num_logprobs.is_none()));
    let places = |kind: Kind| {
        let start = order.partition_point(|&idx| Kind::of(&rows[idx]) < kind);
        start..order.partition_point(|&idx| Kind::of(&rows[idx]) <= kind)
    };

    let max_top = rows.iter().filter_map(|row| row.num_logprobs).max().unwrap_or(0).min(vocab_size as u32) as usize;
    // Tokens, their log-probabilities, then the most likely tokens and theirs.
    let num_rows = rows.len();
    let mut memory = scratch::<u32>(device, num_rows * (2 + 2 * max_top))?;
    let known: Vec<u32> = order[places(Kind::Known)].iter().map(|&idx| known_token(&rows[idx])).collect();
    write(device, &mut memory, places(Kind::Known).start, &known)?;
    let tokens = Address::of(&memory);
    let logprobs = tokens.plus(num_rows * WORD);
    let top_tokens = logprobs.plus(num_rows * WORD);
    let call = Call { device, logits, vocab_size, rows, order: &order };
    call.draw(places(Kind::Drawn), tokens)?;
    call.draw_adjusted(places(Kind::Adjusted), tokens)?;
    for kind in [Kind::Drawn, Kind::Adjusted, Kind::Known] {
        let start = places(kind).start;
        let told = order[places(kind)].iter().take_while(|&&idx| rows[idx].num_logprobs.is_some()).count();
        let out = [tokens, logprobs].map(|array| array.plus(start * WORD));
        let top = [0, num_rows * max_top].map(|first| top_tokens.plus((first + start * max_top) * WORD));
        call.tell(start..start + told, (out, top, max_top))?;
    }

    let found = download(device, &memory)?;
    let (tokens, rest) = found.split_at(num_rows);
    let (logprobs, rest) = rest.split_at(num_rows);
    let (top_tokens, top_logprobs) = rest.split_at(num_rows * max_top);
    let mut reads = vec![ReadRow::default(); num_rows];
    for (place, &idx) in order.iter().enumerate() {
        let read = &mut reads[idx];
        read.token = Some(tokens[place]).filter(|&token| token != NONE);
        let (Some(num_top), Some(_)) = (rows[idx].num_logprobs, read.token) else { continue };
        read.logprob = Some(f32::from_bits(logprobs[place]));
        let own = place * max_top..place * max_top + (num_top as usize).min(vocab_size);
        let both = top_tokens[own.clone()].iter().zip(&top_logprobs[own]);
        read.top = both.map(|(&token, &bits)| (token, f32::from_bits(bits))).collect();
    }
    Ok(reads)
}

fn known_token(row: &LogitRow) -> u32 {
    match row.choice {
        Choice::Known(token) => token,
        Choice::Draw(_) => unreachable!("a row of another kind"),
    }
}

fn draw_of(row: &LogitRow) -> &Draw {
    match &row.choice {
        Choice::Draw(draw) => draw,
        Choice::Known(_) => unreachable!("a row of another kind"),
    }
}

struct Call<'a> {
    device: &'a CudaDevice,
    logits: Operand<'a>,
    vocab_size: usize,
    rows: &'a [LogitRow],
    /// Rows by their places.
    order: &'a [usize],
}

impl Call<'_> {
    fn shape(num_rows: usize) -> Launch {
        Launch::rows(num_rows, VOCAB_THREADS)
    }

    /// Tokens of rows as the model gave them.
    fn draw(&self, places: Range<usize>, tokens: Address) -> candle_core::Result<()> {
        let of_place =
            |place: usize| sample_row(self.order[place] as u32, draw_of(&self.rows[self.order[place]]), false);
        let rows: Vec<SampleRow> = places.clone().map(of_place).collect();
        let dtype = name_of(self.logits.0.dtype())?;
        self.sample(dtype, activations(self.logits)?, &rows, tokens.plus(places.start * WORD))
    }

    /// The same of copies in f32 with bias, mask and penalties.
    fn draw_adjusted(&self, places: Range<usize>, tokens: Address) -> candle_core::Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        let (mut biases, mut forbidden, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        let (mut adjustments, mut rows) = (Vec::new(), Vec::new());
        for (position, &idx) in self.order[places.clone()].iter().enumerate() {
            let draw = draw_of(&self.rows[idx]);
            let (own_seen, penalties) = match &draw.penalties {
                Some(penalties) => {
                    (&penalties.seen[..], [penalties.repetition, penalties.frequency, penalties.presence])
                }
                None => (&[][..], [1.0, 0.0, 0.0]),
            };
            let part = |before: usize, own: usize| [before as u32, own as u32];
            let parts = [
                part(biases.len(), draw.bias.len()),
                part(forbidden.len(), draw.forbidden.len()),
                part(seen.len(), own_seen.len()),
            ];
            adjustments.push(Adjustment { row: idx as u32, mask: NONE, parts, penalties });
            rows.push(sample_row(position as u32, draw, true));
            biases.extend_from_slice(&draw.bias);
            forbidden.extend_from_slice(&draw.forbidden);
            seen.extend_from_slice(own_seen);
        }
        let mut words: Vec<u32> = biases.iter().map(|&(token, _)| token).collect();
        words.extend(biases.iter().map(|&(_, bias)| bias.to_bits()));
        words.extend_from_slice(&forbidden);
        words.extend(seen.iter().map(|&(token, _)| token));
        words.extend(seen.iter().map(|&(_, count)| count));
        let words = upload(self.device, &words)?;
        let bias_tokens = Address::of(&words);
        let biases_start = bias_tokens.plus(biases.len() * WORD);
        let forbidden_start = biases_start.plus(biases.len() * WORD);
        let seen_start = forbidden_start.plus(forbidden.len() * WORD);
        let lists = AdjustmentLists {
            bias_tokens,
            biases: biases_start,
            forbidden: forbidden_start,
            seen: seen_start,
            output_counts: seen_start.plus(seen.len() * WORD),
            masks: Address::NULL,
        };
        let adjusted = scratch::<f32>(self.device, places.len() * self.vocab_size)?;
        let adjustments = upload(self.device, &adjustments)?;
        let (logits, out, size) = (activations(self.logits)?, Address::of(&adjusted), self.vocab_size as u32);
        let kernel = format!("adjust_logits_{}", name_of(self.logits.0.dtype())?);
        // SAFETY: the arguments of the kernel; the parts are those of the lists, and there is room for all rows.
        unsafe {
            launch(
                self.device,
                &kernel,
                Self::shape(places.len()),
                &[&logits, &out, &Address::of(&adjustments), &lists, &size],
            )
        }?;
        self.sample("float", out, &rows, tokens.plus(places.start * WORD))
    }

    fn sample(&self, dtype: &str, logits: Address, rows: &[SampleRow], out: Address) -> candle_core::Result<()> {
        let is_drawn = rows.iter().any(|row| row.temperature != 0.0);
        let candidates = scratch::<u64>(self.device, if is_drawn { rows.len() * self.vocab_size } else { 0 })?;
        let on_device = upload(self.device, rows)?;
        let [rows_start, candidates_start] = [Address::of(&on_device), Address::of(&candidates)];
        let (kernel, size) = (format!("sample_{dtype}"), self.vocab_size as u32);
        // SAFETY: the arguments of the kernel, with a candidate for each token of each row where one is drawn.
        unsafe {
            launch(
                self.device,
                &kernel,
                Self::shape(rows.len()),
                &[&logits, &rows_start, &candidates_start, &out, &size],
            )
        }
    }

    /// Log-probabilities of the tokens at these places, and of the most likely ones.
    fn tell(
        &self,
        places: Range<usize>,
        ([tokens, logprobs], [top_tokens, top_logprobs], max_top): ([Address; 2], [Address; 2], usize),
    ) -> candle_core::Result<()> {
        let of_place = |place: usize| {
            let idx = self.order[place];
            LogprobRow { row: idx as u32, num_top: self.rows[idx].num_logprobs.unwrap_or(0) }
        };
        let rows: Vec<LogprobRow> = places.clone().map(of_place).collect();
        let on_device = upload(self.device, &rows)?;
        let (logits, rows_start) = (activations(self.logits)?, Address::of(&on_device));
        let kernel = format!("log_softmax_top_{}", name_of(self.logits.0.dtype())?);
        let (size, max_top) = (self.vocab_size as u32, max_top as u32);
        // SAFETY: the arguments of the kernel; no row wants more of the most likely tokens than the most, or the vocabulary has no more.
        unsafe {
            launch(
                self.device,
                &kernel,
                Self::shape(places.len()),
                &[&logits, &rows_start, &tokens, &logprobs, &top_tokens, &top_logprobs, &size, &max_top],
            )
        }
    }
}

fn sample_row(row: u32, draw: &Draw, is_adjusted: bool) -> SampleRow {
    let Draw { temperature, top_k, top_p, min_p, uniform, .. } = *draw;
    SampleRow { row, top_k, temperature, top_p, min_p, is_adjusted: u32::from(is_adjusted), uniform }
}
