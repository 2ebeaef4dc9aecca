//! The source package of llama-cpp-python, for the vocabularies, test pairs and chat templates that llama.cpp tests with.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// pip asks a source package for its metadata before it lets go of it, which would want a compiler and CMake: a stand-in of
/// the build backend answers instead. The archive is checked, and only llama.cpp's `models` folder unpacked.
const FETCH: &str = r#"
import hashlib, os, subprocess, sys, tarfile
out, work = sys.argv[1:]
os.makedirs(work + "/backend/scikit_build_core")
open(work + "/backend/scikit_build_core/__init__.py", "w").close()
with open(work + "/backend/scikit_build_core/build.py", "w") as f:
    f.write('''
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "llama_cpp_python-0.3.36.dist-info"
    os.makedirs(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
    return name
''')
subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:",
                "--no-build-isolation", "-d", work, "llama-cpp-python==0.3.36"],
               env=dict(os.environ, PYTHONPATH=work + "/backend"), check=True)
archive = work + "/llama_cpp_python-0.3.36.tar.gz"
with open(archive, "rb") as f: found = hashlib.sha256(f.read()).hexdigest()
if found != "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e": sys.exit(f"{archive}: sha256 {found}")
models = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/"
with tarfile.open(archive) as t:
    for m in t:
        if m.isfile() and m.name.startswith(models):
            m.name = os.path.normpath(m.name[len(models):])
            if m.name.startswith(".."): sys.exit(f"{archive}: {m.name}")
            t.extract(m, work + "/out/models")
try: os.rename(work + "/out", out)
except OSError:
    if not os.path.isdir(out): raise  # else another test was quicker
"#;

/// The folder that holds `models`, fetched on first use.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = target.join("llama-cpp-python-0.3.36");
        if !folder.is_dir() {
            let work = tempfile::tempdir_in(target).expect("a folder under target");
            let done = Command::new("python3").args(["-c", FETCH]).arg(&folder).arg(work.path()).status();
            assert!(done.expect("python3 runs").success(), "pip download llama-cpp-python==0.3.36 failed, see above");
        }
        folder
    })
}
