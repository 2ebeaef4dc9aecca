//! The pointers: everything that workers share without locks goes through the three types of this file.
//!
//! A forward pass is a sequence of phases; in a phase the tasks write disjoint parts of a buffer, between phases stands a
//! barrier ([`crate::Worker::sync`]). Rust cannot see that, so [`Shared`] hands out slices through `unsafe` methods whose
//! contract is that sentence, and the code of a phase says in one line why it keeps it.
#![allow(unsafe_code)]

use crate::format::Format;
use bytemuck::Zeroable;
use memmap2::MmapMut;
use std::marker::PhantomData;
use std::ops::Range;

/// A zeroed buffer that the workers of a team read and write in turns.
///
/// Memory comes from the kernel as untouched zero pages: what is never written costs nothing, so a KV cache for 32768
/// positions can be made at once and grows as it is filled. Aligned to a page.
pub struct Shared<T> {
    // Kept for its Drop: unmaps. `ptr` points into it.
    _map: MmapMut,
    ptr: *mut T,
    len: usize,
}

// SAFETY: the buffer is plain memory of a `T` that may itself move between threads; who may touch which part when is the
// contract of the unsafe methods below.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above; `&Shared` gives access only through the unsafe methods.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T: Zeroable + Copy> Shared<T> {
    /// A buffer of `len` zeroed elements, from 2 MiB on in huge pages where the system has them. Fails where the address
    /// space or the system's limit does not hold it.
    pub fn new(len: usize) -> std::io::Result<Shared<T>> {
        Shared::with_pages(len, true)
    }

    /// The same in small pages: for a buffer that is filled slowly and in many places, of which huge pages would take
    /// 2 MiB each time. (A KV cache of 80 layers would begin with gigabytes.)
    pub fn sparse(len: usize) -> std::io::Result<Shared<T>> {
        Shared::with_pages(len, false)
    }

    fn with_pages(len: usize, huge: bool) -> std::io::Result<Shared<T>> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|&b| b <= isize::MAX as usize).ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::OutOfMemory, "buffer larger than the address space")
        })?;
        // Not reserved: a context that is never filled must not be refused.
        let mut map = memmap2::MmapOptions::new().len(bytes.max(1)).no_reserve_swap().map_anon()?;
        #[cfg(target_os = "linux")]
        if bytes >= 2 << 20 {
            // Systems differ in what they do unasked. Where they cannot do as they are told, it works all the same.
            let _ = map.advise(if huge { memmap2::Advice::HugePage } else { memmap2::Advice::NoHugePage });
        }
        let ptr = map.as_mut_ptr().cast::<T>();
        assert!(ptr.is_aligned(), "a page is aligned for every type used here");
        Ok(Shared { _map: map, ptr, len })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Everything, for the one who holds the buffer alone.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `ptr..ptr + len` is mapped, aligned and holds valid (zeroed or written) `T`; `&mut self` excludes others.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }

    /// A part, for reading.
    ///
    /// # Safety
    /// Nobody writes to it while the slice lives: its writers stand before the last barrier or after the next one.
    pub unsafe fn read(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: in bounds by the check; validity as in `as_mut_slice`; aliasing by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.add(range.start), range.len()) }
    }

    /// A part, for writing.
    ///
    /// # Safety
    /// Nobody else reads or writes it while the slice lives: in this phase the part belongs to the calling task alone.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: as in `read`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

impl Shared<u32> {
    /// Writes `values` to every `stride`-th element from `start` on.
    ///
    /// # Safety
    /// As for [`Shared::write`], for those elements.
    pub(crate) unsafe fn scatter(&self, start: usize, stride: usize, values: &[u32]) {
        self.check_strided(start, stride, values.len());
        for (i, &v) in values.iter().enumerate() {
            // SAFETY: in bounds by the check; aliasing by the caller's promise.
            unsafe { self.ptr.add(start + i * stride).write(v) };
        }
    }

    /// Reads every `stride`-th element from `start` on.
    ///
    /// # Safety
    /// As for [`Shared::read`], for those elements.
    pub(crate) unsafe fn gather(&self, start: usize, stride: usize, values: &mut [u32]) {
        self.check_strided(start, stride, values.len());
        for (i, v) in values.iter_mut().enumerate() {
            // SAFETY: in bounds by the check; aliasing by the caller's promise.
            *v = unsafe { self.ptr.add(start + i * stride).read() };
        }
    }

    fn check_strided(&self, start: usize, stride: usize, n: usize) {
        let end = match n.checked_sub(1) {
            Some(last) => {
                last.checked_mul(stride).and_then(|at| at.checked_add(start)).and_then(|at| at.checked_add(1))
            }
            None => Some(0),
        };
        assert!(end.is_some_and(|end| end <= self.len), "{n} elements {stride} apart from {start} on, of {}", self.len);
    }
}

impl Shared<f32> {
    /// The outputs of a panel: rows `rows` of the columns `0..cols` of a matrix stored column after column, `stride` apart.
    ///
    /// # Safety
    /// As for [`Shared::write`], for those elements.
    pub unsafe fn out(&self, start: usize, stride: usize, rows: Range<usize>, cols: usize) -> Out<'_> {
        assert!(rows.start <= rows.end && (rows.end <= stride || cols <= 1));
        let end = extent(stride, rows.end, cols).and_then(|n| n.checked_add(start));
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{cols} columns {stride} apart from {start} on, of {}",
            self.len
        );
        // SAFETY: in bounds by the checks, which count one column where there is none.
        Out { ptr: unsafe { self.ptr.add(start + rows.start) }, stride, rows: rows.len(), cols, _life: PhantomData }
    }
}

/// Elements from the first to the last of `rows` in the last of `cols` columns (of one, where there is none) that lie `stride`
/// apart; none where no address is as large.
fn extent(stride: usize, rows: usize, cols: usize) -> Option<usize> {
    cols.saturating_sub(1).checked_mul(stride)?.checked_add(rows)
}

/// Consecutive rows of a weight matrix.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    pub(crate) format: Format,
    pub(crate) data: &'a [u8], // (rows, row_bytes)
    pub(crate) row_bytes: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<'a> Panel<'a> {
    /// The blocks of one row.
    pub(crate) fn row(&self, r: usize) -> &'a [u8] {
        &self.data[r * self.row_bytes..(r + 1) * self.row_bytes]
    }

    /// The blocks of slab `s` of a row: 256 weights, in the last slab perhaps fewer.
    pub(crate) fn slab(&self, r: usize, s: usize) -> &'a [u8] {
        let spec = self.format.spec();
        let per_slab = crate::format::SLAB / spec.block_len * spec.block_bytes;
        let row = self.row(r);
        &row[s * per_slab..row.len().min((s + 1) * per_slab)]
    }

    /// Slabs in a row, a last partial one counted.
    pub(crate) fn slabs(&self) -> usize {
        self.cols.div_ceil(crate::format::SLAB)
    }
}

/// The blocks that end a row, and zeros behind them.
pub(crate) fn padded<const BYTES: usize>(b: &[u8]) -> [u8; BYTES] {
    let mut whole = [0; BYTES];
    whole[..b.len()].copy_from_slice(b);
    whole
}

/// The `R` rows that a gemv processes together in step `i`. Stream `r` walks through its own contiguous part of the panel, so
/// that memory sees a few long streams, and each slab of the activations serves all of them. (Neighbouring rows side by side,
/// streams of one row's length, gave two thirds of that on Zen 4.) Where the panel ends before a stream does, the stream
/// repeats a row of another one, which [`Rows::each`] leaves out.
pub(crate) struct Rows<const R: usize, const BYTES: usize> {
    rows: [usize; R],
    starts: [usize; R], // in bytes
    new: [bool; R],
    ends: Option<[[u8; BYTES]; R]>,
}

impl<const R: usize, const BYTES: usize> Rows<R, BYTES> {
    /// Steps through a panel.
    pub fn steps(w: &Panel<'_>) -> usize {
        w.rows.div_ceil(R)
    }

    #[inline(always)]
    pub fn at(w: &Panel<'_>, i: usize) -> Rows<R, BYTES> {
        let (mut rows, mut new) = ([0; R], [false; R]);
        for r in 0..R {
            let row = r * Rows::<R, BYTES>::steps(w) + i;
            (rows[r], new[r]) = (row.min(w.rows - 1), row < w.rows);
        }
        // At the end of a row that is no multiple of 256 a slab goes on into the next row. Where the panel ends before that,
        // it is taken from here.
        let whole = w.row_bytes / BYTES * BYTES;
        let mut ends = None;
        if rows[R - 1] * w.row_bytes + w.slabs() * BYTES > w.data.len() {
            ends = Some(rows.map(|r| padded(&w.row(r)[whole..])));
        }
        Rows { rows, starts: rows.map(|r| r * w.row_bytes), new, ends }
    }

    /// Slab `s` of the row of stream `r`, `BYTES` long. Prefetches what lies some 4 KB further on in the stream, which is the
    /// latency of memory. (The hardware's prefetchers start over at every page; this gave up to a third more.)
    ///
    /// At the end of a row that is no multiple of 256 these bytes go on into the next row: the activations there are zeros
    /// with zero scales, which no finite weight can change. (One that is infinite or NaN makes its own row's output NaN, and
    /// that of the row before.)
    #[inline(always)]
    pub fn slab<'a>(&'a self, w: &Panel<'a>, r: usize, s: usize) -> &'a [u8; BYTES] {
        let at = self.starts[r] + s * BYTES;
        // Far ahead into L2, a little ahead into L1.
        prefetch::<false>(w.data.as_ptr().wrapping_add(at + AHEAD), BYTES);
        prefetch::<true>(w.data.as_ptr().wrapping_add(at + NEAR), BYTES);
        match w.data[at..].first_chunk() {
            Some(b) => b,
            None => self.end(r),
        }
    }

    /// Kept out of line and cold: selecting an address for each load of a slab would take longer than the loads.
    #[cold]
    #[inline(never)]
    fn end(&self, r: usize) -> &[u8; BYTES] {
        &self.ends.as_ref().expect("made for rows this near the end")[r]
    }

    /// The rows, each once, with the number of its stream.
    pub fn each(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..R).filter(|&r| self.new[r]).map(|r| (r, self.rows[r]))
    }
}

/// Prefetch distances in bytes: from memory to L2, from L2 to L1.
const AHEAD: usize = 4096;
const NEAR: usize = 512;

/// Prefetches `bytes` from `at` on into L1 (`FIRST`) or L2; the addresses need not be valid.
#[inline(always)]
pub(crate) fn prefetch<const FIRST: bool>(at: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..bytes.div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let at = at.wrapping_add(64 * line).cast();
        // SAFETY: no address makes it fault.
        unsafe { if FIRST { _mm_prefetch::<_MM_HINT_T0>(at) } else { _mm_prefetch::<_MM_HINT_T1>(at) } };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
}

/// Prefetches part `i` of `parts` equal parts of what comes next into L2.
#[inline(always)]
pub(crate) fn prefetch_part<T>(next: &[T], i: usize, parts: usize) {
    let bytes = size_of_val(next);
    let (from, to) = (bytes * i / parts, bytes * (i + 1) / parts);
    prefetch::<false>(next.as_ptr().cast::<u8>().wrapping_add(from), to - from);
}

/// Where a kernel writes: element (row, column) at `column * stride + row`.
pub struct Out<'a> {
    ptr: *mut f32,
    stride: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    _life: PhantomData<&'a mut f32>,
}

impl<'a> Out<'a> {
    /// Outputs in a slice that the caller owns: `cols` columns of `stride` elements, the first `rows` of each written.
    pub fn new(slice: &'a mut [f32], stride: usize, rows: usize, cols: usize) -> Out<'a> {
        let whole = cols == 0 || extent(stride, rows, cols).is_some_and(|n| n <= slice.len());
        assert!(rows <= stride && whole, "{cols} columns of {rows} rows, {stride} apart, in {}", slice.len());
        Out { ptr: slice.as_mut_ptr(), stride, rows, cols, _life: PhantomData }
    }

    /// The rows `at..at + n` of column `col`.
    pub(crate) fn column(&mut self, col: usize, at: usize, n: usize) -> &mut [f32] {
        assert!(col < self.cols && at + n <= self.rows);
        // SAFETY: in bounds by the check and the constructor's; ours alone by `&mut self` and the constructor's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(col * self.stride + at), n) }
    }
}

/// What a worker's kernels need beside their operands: three buffers that grow on demand and keep their memory. One for each
/// worker, made once.
#[derive(Default)]
pub struct Scratch {
    /// Accumulators in f32.
    pub(crate) floats: Aligned,
    /// Unpacked operands: weights of the rows at hand, or keys.
    pub(crate) tile: Aligned,
    /// What is prepared of the activations: whole columns in a gemv's order, sums in a gemm; a softmax's state in attention.
    pub(crate) sums: Aligned,
}

/// Aligns the stack of the function that it stands in, and of what is inlined there, to a cache line.
///
/// The compiler aligns a stack for variables, but not for the vectors that it puts there when it runs out of registers: those
/// cross lines, and in one process of some ten, by where its stack happens to begin, pages. A product was then five times
/// slower.
macro_rules! align_stack {
    () => {
        std::hint::black_box(&mut std::mem::MaybeUninit::<$crate::panel::Line>::uninit());
    };
}
pub(crate) use align_stack;

/// Memory aligned to a cache line that only grows.
#[derive(Default)]
pub(crate) struct Aligned(Vec<Line>);

#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

impl Aligned {
    /// Room for `n` elements; their values are what the last user left.
    pub(crate) fn take<T: bytemuck::Pod>(&mut self, n: usize) -> &mut [T] {
        let lines = (n * size_of::<T>()).div_ceil(64);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 64]));
        }
        &mut bytemuck::cast_slice_mut(&mut self.0[..lines])[..n]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_is_zeroed_and_bounded() {
        let mut s = Shared::<f32>::new(1000).unwrap();
        assert!(s.as_mut_slice().iter().all(|&x| x == 0.0));
        // SAFETY: one thread, one slice at a time.
        unsafe { s.write(10..20) }.fill(1.0);
        assert_eq!(s.as_mut_slice().iter().sum::<f32>(), 10.0);
        assert!(Shared::<f32>::new(usize::MAX / 2).is_err());
    }

    #[test]
    fn out_addresses_columns() {
        let mut v = vec![0.0; 12];
        let mut o = Out::new(&mut v, 4, 3, 3);
        o.column(2, 1, 2).copy_from_slice(&[5.0, 6.0]);
        assert_eq!(v[9..11], [5.0, 6.0]);
    }
}
