//go:build e2e

package e2e

import (
	"crypto/rand"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// exec runs a shell script in the session's container, beside OpenCode, and
// returns what it printed. What the agent does goes through OpenCode instead.
func (h *nodeHost) exec(tb testing.TB, session, script string) string {
	tb.Helper()
	stdout, stderr, err := h.tryExec(tb, session, script)
	if err != nil {
		tb.Fatalf("in session %s: %v\n%s\n%s\n%s", session, err, script, stdout, stderr)
	}
	return stdout
}

func (h *nodeHost) tryExec(tb testing.TB, session, script string) (stdout, stderr string, err error) {
	tb.Helper()
	// While a checkpoint is taken, the container stands still and takes no process.
	within(10*time.Second, func() bool {
		stdout, stderr, err = run(tb, 2*time.Minute, cleanEnv(), filepath.Join(work.libexec, "ctr"), "-a", h.containerd(tb), "-n", "cloudcode",
			"task", "exec", "--exec-id", "e2e-"+strings.ToLower(rand.Text()[:10]), "--cwd", projectDir, session, "bash", "-c", script)
		return err == nil || !strings.Contains(stderr, "in a paused")
	})
	return stdout, stderr, err
}

// agentWork is what an agent does with its tools, one prompt each: what real
// projects have, and what file systems stumble over. Nothing of it needs a network.
var agentWork = []struct {
	what, command string
	// What it takes: a real file system; renames that other mounters than TigrisFS
	// do not make at once; or nothing more than any mount of a bucket has.
	needs string
}{
	{"git repository", `set -e; git init -q repo; cd repo; git config user.name agent; git config user.email agent@example.com
for i in 1 2 3 4 5; do echo "line $i" >> README; mkdir -p src/$i; seq $((i*1000)) > src/$i/numbers; git add -A; git commit -qm "commit $i"; done
git checkout -q -b feature; echo feature > feature; git add feature; git commit -qm feature; git checkout -q -; git tag v1
echo changed >> README; echo staged > staged; git add staged; echo untracked > untracked; git stash list; git status --porcelain`, "renames"},
	{"npm install", `set -e; export npm_config_update_notifier=false npm_config_cache=/tmp/npm
mkdir -p /tmp/lib/bin; cd /tmp/lib; echo '{"name":"e2e-lib","version":"1.0.0","bin":{"e2e-tool":"bin/tool.js"},"dependencies":{"e2e-dep":"file:e2e-dep-1.0.0.tgz"},"scripts":{"postinstall":"node -e \"require(\\\"fs\\\").writeFileSync(\\\"built\\\",\\\"1\\\",{mode:0o755})\""}}' > package.json
printf '#!/usr/bin/env node\nconsole.log("tool runs with " + require("e2e-dep"))\n' > bin/tool.js
mkdir -p /tmp/dep; cd /tmp/dep; echo '{"name":"e2e-dep","version":"1.0.0","main":"index.js"}' > package.json; echo 'module.exports = "its dependency"' > index.js
npm pack --silent --pack-destination /tmp/lib >/dev/null
mkdir -p ` + projectDir + `/app/packages/linked; cd ` + projectDir + `/app; cp /tmp/lib/e2e-dep-1.0.0.tgz .; (cd /tmp/lib; npm pack --silent --pack-destination ` + projectDir + `/app >/dev/null)
echo '{"name":"linked","version":"1.0.0","bin":"cli.js"}' > packages/linked/package.json; printf '#!/usr/bin/env node\nconsole.log("linked")\n' > packages/linked/cli.js
echo '{"name":"app","version":"1.0.0","dependencies":{"linked":"file:packages/linked"}}' > package.json
npm install --offline --no-audit --no-fund ./e2e-dep-1.0.0.tgz ./e2e-lib-1.0.0.tgz 2>&1 | tail -2; node_modules/.bin/e2e-tool; node_modules/.bin/linked`, "posix"},
	{"large file", `set -e; head -c 52428800 /dev/urandom > large.bin; stat -c %s large.bin`, ""},
	{"many small files", `python3 - <<'P'
import os
for i in range(3000):
    d = "many/%02d/%02d" % (i % 20, i // 20 % 10); os.makedirs(d, exist_ok=True)
    with open("%s/file-%04d.txt" % (d, i), "w") as f: f.write(("number %d\n" % i) * (i % 40))
P
find many -type f | wc -l`, ""},
	{"odd files", `python3 - <<'P'
import os, socket
os.mkdir("odd"); os.chdir("odd")
def put(name, data=b"x", mode=0o644):
    with open(name, "wb") as f: f.write(data)
    os.chmod(name, mode)
for i, name in enumerate(["space name", "quote'\"` + "`" + `", "back\\slash", "new\nline", "-dash", "ünï-日本語", "UPPER", "upper", "e\u0301", "\u00e9", ".hidden", "a" * 255, "percent%2Fslash", "tab\there", "*?[]"]):
    put(name, b"%d" % i)
put(b"not utf-8 \xff\xfe", b"bytes")
put("empty", b"")
for mode in (0o000, 0o111, 0o400, 0o600, 0o640, 0o755, 0o777, 0o2755, 0o4755): put("mode-%04o" % mode, b"m", mode)
os.mkdir("sticky"); os.chmod("sticky", 0o1777); os.mkdir("empty-folder"); os.mkdir("private", 0o700); put("private/inside")
put("owned"); os.chown("owned", 1000, 1001); put("linked", b"hard"); os.mkdir("sub"); os.link("linked", "sub/also linked"); os.link("linked", "third")
os.symlink("linked", "sym"); os.symlink("/root/s3/workspace", "absolute"); os.symlink("nowhere", "dangling"); os.symlink("../..", "up"); os.lchown("dangling", 1000, 1000)
os.setxattr("linked", "user.e2e", b"\x00value\xff"); os.setxattr("sub", "user.folder", b"of a folder")
with open("sparse", "wb") as f: f.truncate(256 << 20); f.seek(170 << 20); f.write(b"in the middle")
os.mkfifo("fifo"); os.mkdir("with-socket"); socket.socket(socket.AF_UNIX).bind("with-socket/socket")
os.utime("empty", ns=(1, 1234567890123456789)); os.utime("dangling", ns=(1, 987654321000000001), follow_symlinks=False); os.utime("empty-folder", ns=(1, 1111111111222222222))
p = "deep"
for i in range(40): p += "/folder-%02d" % i
os.makedirs(p); put(p + "/bottom")
print("made", len(os.listdir(".")))
P`, "posix"},
}

// doWork lets the agent do it in one chat, as far as the folder has what it needs,
// and checks that it did. On a mount there are a tenth of the small files.
func doWork(tb testing.TB, oc *openCode, chat string, has ...string) {
	tb.Helper()
	for _, w := range agentWork {
		if w.needs != "" && !slices.Contains(has, w.needs) {
			continue
		}
		if !slices.Contains(has, "posix") {
			w.command = strings.ReplaceAll(w.command, "range(3000)", "range(300)")
		}
		oc.prompt(tb, chat, "bash "+w.command)
		list, err := oc.messages(bounded(tb, 20*time.Second), chat)
		if err != nil {
			tb.Fatal(err)
		}
		ok := false
		for _, m := range list[max(0, len(list)-2):] {
			for _, p := range m.Parts {
				if p.Type == "tool" {
					ok = p.State.Status == "completed" && !regexp.MustCompile(`(?i)error|fatal`).MatchString(p.State.Output)
					if !ok {
						tb.Fatalf("%s: %s %s", w.what, p.State.Status, p.State.Output)
					}
				}
			}
		}
		if !ok {
			tb.Fatalf("%s: the agent called no tool: %+v", w.what, list)
		}
	}
}

// treeScript prints one line for everything below the folders that it is given,
// sorted, with all that must come back: type, mode, owner, time, content, links.
// Sockets are left out, and the time of the folder that holds one: no checkpoint
// has them.
const treeScript = `
import hashlib, os, stat, sys
inodes, lines = {}, []
def walk(top):
    st = os.lstat(top); lines.append(one(top, st))
    if stat.S_ISDIR(st.st_mode):
        for name in os.listdir(top): walk(os.path.join(top, name))
def one(p, st):
    m, kind = st.st_mode, stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFSOCK: return None
    out = [repr(p), oct(m), "%d:%d" % (st.st_uid, st.st_gid)]
    if kind == stat.S_IFREG:
        h = hashlib.sha256()
        with open(p, "rb") as f:
            while True:
                b = f.read(1 << 20)
                if not b: break
                h.update(b)
        out += [str(st.st_size), h.hexdigest()[:16], "mtime=%d" % st.st_mtime_ns]
        if st.st_size > 4096 and st.st_blocks * 512 < st.st_size // 2: out.append("sparse")
        if st.st_nlink > 1:
            inodes.setdefault(st.st_ino, []).append(p); out.append("nlink=%d" % st.st_nlink)
    elif kind == stat.S_IFLNK: out += ["-> " + repr(os.readlink(p)), "mtime=%d" % st.st_mtime_ns]
    elif kind == stat.S_IFDIR and not p.endswith(b"with-socket"): out.append("mtime=%d" % st.st_mtime_ns)
    for x in sorted(os.listxattr(p, follow_symlinks=False)):
        if x.startswith("user."): out.append("%s=%r" % (x, os.getxattr(p, x, follow_symlinks=False)))
    return " ".join(out)
for top in sys.argv[1:]: walk(os.fsencode(top))
for group in inodes.values(): lines.append("linked: " + " ".join(repr(p) for p in sorted(group)))
print("\n".join(sorted(l for l in lines if l)))
`

// contentScript prints what any mount of a bucket must hold: names and content
// of regular files. Git's own are left out: git renames and removes files so
// quickly that a mounter may not see each of them, which is why work with git
// belongs in mode SNAPSHOT.
const contentScript = `
import hashlib, os, stat, sys
for top in sys.argv[1:]:
    for d, dirs, files in os.walk(os.fsencode(top)):
        dirs[:] = sorted(x for x in dirs if x != b".git")
        for name in sorted(files):
            p = os.path.join(d, name)
            if stat.S_ISREG(os.lstat(p).st_mode):
                with open(p, "rb") as f: print(repr(p), hashlib.sha256(f.read()).hexdigest()[:16])
`

// tree returns what a script prints of folders in the session's container.
func (h *nodeHost) tree(tb testing.TB, session, script string, folders ...string) string {
	tb.Helper()
	return h.exec(tb, session, "python3 - "+strings.Join(folders, " ")+" <<'P'"+script+"P")
}

// diffLines names the first lines that two texts do not share.
func diffLines(want, got string) string {
	count := map[string]int{}
	for l := range strings.Lines(want) {
		count[l]++
	}
	for l := range strings.Lines(got) {
		count[l]--
	}
	var out []string
	for l := range strings.Lines(want) {
		if count[l] > 0 {
			out = append(out, "missing: "+l)
		}
	}
	for l := range strings.Lines(got) {
		if count[l] < 0 {
			out = append(out, "new:     "+l)
		}
	}
	if len(out) > 20 {
		out = append(out[:20], fmt.Sprintf("and %d more lines\n", len(out)-20))
	}
	return strings.Join(out, "")
}

// repoState is what git says of the agent's repository. It writes nothing there:
// git would refresh its index.
func (h *nodeHost) repoState(tb testing.TB, session string) string {
	tb.Helper()
	return h.exec(tb, session, `cd repo && export GIT_OPTIONAL_LOCKS=0 GIT_INDEX_FILE=/tmp/index && cp .git/index /tmp/index && git fsck --full --strict 2>&1 && git status --porcelain --branch && git log --all --format='%H %s %D' && git stash list && git diff --stat`)
}
