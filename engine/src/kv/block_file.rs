//! A KV block as a file: `<id>.kv`, little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 16 | format and its version |
//! | 32 | BLAKE3 digest of everything behind it |
//! | 32 | root of the hash chain: tenant, model, arithmetic |
//! | 32 | id of the block before it, or the root |
//! | 32 | its own id |
//! | 4 | number of tokens |
//! | 4 each | tokens |
//! | 4 each | numbers, `[layer][token][width]` |
//!
//! A file has its name only once it is whole and on the disk, and is used only if its digest fits, so
//! neither a crash nor a fault of the disk brings numbers that were not computed. Files are read, not mapped: every
//! byte is hashed and then copied into the pool anyway, so a map would save nothing, and would need `unsafe`.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use tandem_proto::ids::Digest;
use tandem_proto::limits::KV_BLOCK_TOKENS;

const FORMAT: &[u8; 16] = b"tandem-kv-blk-1\n";
const DIGEST_END: usize = FORMAT.len() + 32;
const HEAD_BYTES: usize = DIGEST_END + 3 * 32 + 4;
/// How the name of a block's file ends.
const SUFFIX: &str = ".kv";
/// How the name of a file ends that is being written.
const PARTIAL_SUFFIX: &str = ".kv.part";

/// Why a file is not the block it is taken for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlockFileError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is no KV block of this version")]
    Format,
    #[error("it is of another model, arithmetic or tenant")]
    Foreign,
    #[error("it is damaged")]
    Damaged,
}

/// What a block is the state of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub(crate) root: Digest,
    pub(crate) parent: Digest,
    pub(crate) id: Digest,
    pub(crate) tokens: Vec<u32>,
}

/// Bytes of the file of a block of `tokens` tokens with `numbers` numbers each.
pub(crate) fn file_bytes(tokens: usize, numbers: usize) -> u64 {
    (HEAD_BYTES + 4 * tokens) as u64 + 4 * tokens as u64 * numbers as u64
}

fn path(dir: &Path, id: Digest) -> PathBuf {
    dir.join(format!("{id}{SUFFIX}"))
}

/// Writes a block, for its owner's eyes only.
pub(crate) fn write(dir: &Path, place: &Place, numbers: &[f32]) -> Result<(), BlockFileError> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + 4 * (place.tokens.len() + numbers.len()));
    bytes.extend_from_slice(FORMAT);
    bytes.extend_from_slice(&[0; 32]);
    for id in [place.root, place.parent, place.id] {
        bytes.extend_from_slice(&id.0);
    }
    bytes.extend_from_slice(&(place.tokens.len() as u32).to_le_bytes());
    place.tokens.iter().for_each(|token| bytes.extend_from_slice(&token.to_le_bytes()));
    numbers.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
    let digest = Digest::of(&bytes[DIGEST_END..]);
    bytes[FORMAT.len()..DIGEST_END].copy_from_slice(&digest.0);
    // Readable for its owner only, and removed unless it gets its name.
    let mut file = tempfile::Builder::new().suffix(PARTIAL_SUFFIX).tempfile_in(dir)?;
    file.write_all(&bytes)?;
    file.as_file().sync_data()?;
    file.persist(path(dir, place.id)).map_err(|e| e.error)?;
    Ok(())
}

/// What the head of a block's file says; whether it is true shows when the block is read.
pub(crate) fn read_place(path: &Path) -> Result<Place, BlockFileError> {
    let mut head = Vec::with_capacity(HEAD_BYTES + 4 * KV_BLOCK_TOKENS);
    File::open(path)?.take((HEAD_BYTES + 4 * KV_BLOCK_TOKENS) as u64).read_to_end(&mut head)?;
    let place = parse(&head)?.0;
    let named = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(SUFFIX));
    if named != Some(&*place.id.to_string()) { Err(BlockFileError::Damaged) } else { Ok(place) }
}

/// The numbers of a block of `numbers` numbers per token, if the file holds just this block.
pub(crate) fn read(dir: &Path, place: &Place, numbers: usize) -> Result<Vec<f32>, BlockFileError> {
    let path = path(dir, place.id);
    if fs::metadata(&path)?.len() != file_bytes(place.tokens.len(), numbers) {
        return Err(BlockFileError::Damaged);
    }
    let bytes = fs::read(path)?;
    let (found, data) = parse(&bytes)?;
    if bytes[FORMAT.len()..DIGEST_END] != Digest::of(&bytes[DIGEST_END..]).0 || found != *place {
        return Err(BlockFileError::Damaged);
    }
    Ok(data.as_chunks().0.iter().map(|number| f32::from_le_bytes(*number)).collect())
}

/// Removes a block's file, if there is one.
pub(crate) fn remove(dir: &Path, id: Digest) -> io::Result<()> {
    match fs::remove_file(path(dir, id)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The files of blocks in a folder, the oldest first; what was left half written is removed.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(PARTIAL_SUFFIX) {
            fs::remove_file(entry.path())?;
        } else if name.ends_with(SUFFIX) {
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

/// The place in the head of a file, and what follows it.
fn parse(bytes: &[u8]) -> Result<(Place, &[u8]), BlockFileError> {
    let bytes = bytes.strip_prefix(FORMAT).ok_or(BlockFileError::Format)?;
    let damaged = || BlockFileError::Damaged;
    let (ids, rest) = bytes.split_first_chunk::<128>().ok_or_else(damaged)?;
    let [_, root, parent, id] = ids.as_chunks::<32>().0 else { return Err(damaged()) };
    let (count, rest) = rest.split_first_chunk::<4>().ok_or_else(damaged)?;
    let count = u32::from_le_bytes(*count) as usize;
    if count == 0 || count > KV_BLOCK_TOKENS {
        return Err(damaged());
    }
    let (tokens, rest) = rest.split_at_checked(4 * count).ok_or_else(damaged)?;
    let tokens = tokens.as_chunks().0.iter().map(|token| u32::from_le_bytes(*token)).collect();
    Ok((Place { root: Digest(*root), parent: Digest(*parent), id: Digest(*id), tokens }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(tokens: usize) -> Place {
        let [root, parent, id] = [1, 2, 3].map(|n| Digest([n; 32]));
        Place { root, parent, id, tokens: (7..7 + tokens as u32).collect() }
    }

    /// Whatever byte of a file is another one, or missing: nothing is taken from it.
    #[test]
    fn a_file_is_the_block_that_was_written_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = [0.0, -0.0, 1.5, f32::MIN_POSITIVE / 2.0, f32::from_bits(0x7fc1_2345), -7.25];
        let place = place(3);
        write(dir.path(), &place, &numbers).unwrap();
        let file = path(dir.path(), place.id);
        assert_eq!(list(dir.path()).unwrap(), std::slice::from_ref(&file));
        assert_eq!(read_place(&file).unwrap(), place);
        let bits = |numbers: &[f32]| numbers.iter().map(|n| n.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read(dir.path(), &place, 2).unwrap()), bits(&numbers));
        let whole = fs::read(&file).unwrap();
        assert_eq!(whole.len() as u64, file_bytes(3, 2));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "it is a conversation's");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&file, &bytes).unwrap();
            assert!(read(dir.path(), &place, 2).is_err(), "byte {at}");
            fs::write(&file, &whole[..at]).unwrap();
            assert!(read(dir.path(), &place, 2).is_err(), "{at} bytes");
        }
        // Another block's file under this one's name.
        let other = Place { id: Digest([9; 32]), ..place.clone() };
        write(dir.path(), &other, &numbers).unwrap();
        fs::rename(path(dir.path(), other.id), &file).unwrap();
        assert!(matches!(read(dir.path(), &place, 2), Err(BlockFileError::Damaged)));
        assert!(matches!(read_place(&file), Err(BlockFileError::Damaged)));
        fs::write(dir.path().join("x.kv.part"), "torn").unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 1);
        assert!(!dir.path().join("x.kv.part").exists());
    }
}
