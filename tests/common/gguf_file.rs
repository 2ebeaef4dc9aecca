//! GGUF files for tests, byte for byte as they are told: also what no writer would write.

/// A file in the making.
#[derive(Clone)]
pub struct GgufFile {
    /// The first four bytes.
    pub magic: [u8; 4],
    /// The version.
    pub version: u32,
    /// Number of tensors told, where it is not the true one.
    pub n_tensors: Option<u64>,
    /// Number of keys told, where it is not the true one.
    pub n_keys: Option<u64>,
    /// What offsets are multiples of.
    pub alignment: usize,
    /// Keys with their values.
    pub keys: Vec<Vec<u8>>,
    /// Descriptions of tensors.
    pub infos: Vec<Vec<u8>>,
    /// The data of all tensors.
    pub data: Vec<u8>,
}

/// A string as GGUF has it: its length, then its bytes.
pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    [&(text.as_ref().len() as u64).to_le_bytes(), text.as_ref()].concat()
}

/// An array's value: element type, length, elements.
pub fn array(element: u32, len: u64, bytes: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &len.to_le_bytes(), bytes].concat()
}

impl GgufFile {
    /// An empty file of version 3.
    pub fn new() -> GgufFile {
        let (magic, version, alignment) = (*b"GGUF", 3, 32);
        let (keys, infos, data) = Default::default();
        GgufFile { magic, version, n_tensors: None, n_keys: None, alignment, keys, infos, data }
    }

    /// Adds a key with a value of a type's id.
    pub fn key(mut self, key: impl AsRef<[u8]>, kind: u32, value: &[u8]) -> Self {
        self.keys.push([&string(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    /// Adds a key with a u32.
    pub fn u32(self, key: &str, value: u32) -> Self {
        self.key(key, 4, &value.to_le_bytes())
    }

    /// Adds a key with a string.
    pub fn str(self, key: &str, value: &str) -> Self {
        self.key(key, 8, &string(value))
    }

    /// Adds a key with an array of strings.
    pub fn strs(self, key: &str, values: &[&str]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(string).collect();
        self.key(key, 9, &array(8, values.len() as u64, &bytes))
    }

    /// Adds a description alone.
    pub fn info(mut self, name: impl AsRef<[u8]>, dims: &[u64], kind: u32, offset: u64) -> Self {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
        let parts = [
            &string(name)[..],
            &(dims.len() as u32).to_le_bytes(),
            &dims_bytes,
            &kind.to_le_bytes(),
            &offset.to_le_bytes(),
        ];
        self.infos.push(parts.concat());
        self
    }

    /// Adds a tensor behind the others, and `n_bytes` of data that tell where they are from.
    pub fn tensor(self, name: &str, dims: &[u64], kind: u32, n_bytes: usize) -> Self {
        let at = self.data.len();
        let mut file = self.info(name, dims, kind, at as u64);
        file.data.extend((0..n_bytes).map(|i| (i * 7 + at) as u8));
        file.data.resize(file.data.len().next_multiple_of(file.alignment), 0);
        file
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.infos.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        out.extend(self.keys.iter().chain(&self.infos).flatten());
        out.resize(out.len().next_multiple_of(self.alignment.max(1)), 0);
        out.extend(&self.data);
        out
    }
}

/// A small valid file: every type of value, and tensors of four types.
pub fn valid() -> GgufFile {
    GgufFile::new()
        .str("general.architecture", "llama")
        .str("general.name", "the small valid file")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 512)
        .u32("llama.embedding_length", 64)
        .u32("llama.feed_forward_length", 256)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .u32("command-r.hyphen-ated", 7)
        .key("type.u8", 0, &[250])
        .key("type.i8", 1, &[250])
        .key("type.u16", 2, &65_000u16.to_le_bytes())
        .key("type.i16", 3, &(-2i16).to_le_bytes())
        .key("type.i32", 5, &(-3i32).to_le_bytes())
        .key("type.f32", 6, &1e-6f32.to_le_bytes())
        .key("type.bool", 7, &[1])
        .key("type.u64", 10, &u64::MAX.to_le_bytes())
        .key("type.i64", 11, &i64::MIN.to_le_bytes())
        .key("type.f64", 12, &0.1f64.to_le_bytes())
        .strs("list.strings", &["<s>", "", "Ġthe", "你好"])
        .key("list.i32", 9, &array(5, 3, &[1, 0, 0, 0, 255, 255, 255, 255, 3, 0, 0, 0]))
        .key("list.f32", 9, &array(6, 2, &[0, 0, 128, 63, 0, 0, 0, 64]))
        .key("list.bool", 9, &array(7, 2, &[0, 1]))
        .key("list.empty", 9, &array(4, 0, &[]))
        .key("list.lists", 9, &array(9, 2, &[array(0, 2, &[1, 2]), array(8, 1, &string("x"))].concat()))
        .tensor("token_embd.weight", &[64, 5], 0, 64 * 5 * 4)
        .tensor("blk.0.attn_norm.weight", &[64], 1, 128)
        .tensor("blk.0.ffn-down.weight", &[32, 3, 2], 8, 6 * 34)
        .tensor("blk.0.ffn_up.weight", &[256, 2], 12, 2 * 144)
        .tensor("output.weight", &[66], 24, 66) // i8, with which oxcart does not compute
}
