package cli

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// withFiles is a fleet with a session whose files are on this machine; it returns
// its project folder.
func withFiles(t *testing.T) (*fleet, string) {
	f := newFleet(t)
	f.files = t.TempDir()
	f.put(stored("main"))
	project := filepath.Join(f.files, "workspace", "project")
	if err := os.MkdirAll(project, 0o755); err != nil {
		t.Fatal(err)
	}
	return f, project
}

// grow makes a tree with everything that is to survive a copy.
func grow(t *testing.T, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	when := time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)
	file := func(name, content string, mode fs.FileMode) {
		path := filepath.Join(dir, name)
		must(os.MkdirAll(filepath.Dir(path), 0o755))
		must(os.WriteFile(path, []byte(content), 0o600))
		must(os.Chmod(path, mode))
		must(os.Chtimes(path, when, when))
	}
	file("run.sh", "#!/bin/sh\n", 0o755)
	file("secret", "s", 0o600)
	file("empty", "", 0o644)
	file("big", strings.Repeat("0123456789abcdef", 200_000), 0o644)
	file("-rf", "", 0o644)
	file("a b\nc/ü", "odd", 0o640)
	file(strings.Repeat("long/", 40)+strings.Repeat("n", 200), "deep", 0o644)
	file("locked/in", "x", 0o444)
	must(os.Link(filepath.Join(dir, "big"), filepath.Join(dir, "hard")))
	must(os.Symlink("run.sh", filepath.Join(dir, "link")))
	must(os.Symlink("/nowhere/at/all", filepath.Join(dir, "dangling")))
	must(os.Symlink("../../..", filepath.Join(dir, "up")))
	must(os.Mkdir(filepath.Join(dir, "hollow"), 0o700))
	must(os.Chtimes(filepath.Join(dir, "hollow"), when, when))
	must(os.Chmod(filepath.Join(dir, "locked"), 0o555))
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(dir, "locked"), 0o755) })
}

// tree describes a folder and everything in it.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	inodes := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if d.IsDir() && d.Name() == "locked" {
			t.Cleanup(func() { _ = os.Chmod(path, 0o755) })
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&out, "%q %s", rel, info.Mode())
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(path)
			fmt.Fprintf(&out, " -> %s", to)
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " %d %q %s", len(data), data[:min(20, len(data))], info.ModTime().UTC().Format(time.RFC3339))
			ino := info.Sys().(*syscall.Stat_t).Ino
			if first, ok := inodes[ino]; ok {
				fmt.Fprintf(&out, " = %q", first)
			}
			inodes[ino] = rel
		case rel != "." && d.Name() == "hollow":
			out.WriteString(" " + info.ModTime().UTC().Format(time.RFC3339))
		}
		out.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestCopyKeepsEverything(t *testing.T) {
	f, project := withFiles(t)
	here := t.TempDir()
	src := filepath.Join(here, "src")
	grow(t, src)
	want := tree(t, src)
	if !strings.Contains(want, `"hard" -rw-r--r-- 3200000 "0123456789abcdef0123" 2020-02-03T04:05:06Z = "big"`) {
		t.Fatalf("the tree itself is not as meant:\n%s", want)
	}
	r := f.run("session", "cp", src, "main:data")
	if r.code != 0 || !strings.HasPrefix(r.out, "copied ") || !strings.HasSuffix(r.out, " to main:/root/s3/workspace/project/data\n") || r.err != "" {
		t.Fatalf("%+v", r)
	}
	if have := tree(t, filepath.Join(project, "data")); have != want {
		t.Errorf("copied in:\n%s\nwant:\n%s", have, want)
	}
	r = f.run("session", "cp", "main:data", filepath.Join(here, "back"))
	if r.code != 0 || !strings.HasPrefix(r.out, "copied 12 files, ") {
		t.Fatalf("%+v", r)
	}
	if have := tree(t, filepath.Join(here, "back")); have != want {
		t.Errorf("copied out:\n%s\nwant:\n%s", have, want)
	}
	// Once more over what is there.
	if r := f.run("session", "cp", "main:data/.", filepath.Join(here, "back")); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if have := tree(t, filepath.Join(here, "back")); have != want {
		t.Errorf("copied over:\n%s\nwant:\n%s", have, want)
	}
	// From one session into another.
	f.put(stored("other"))
	if r := f.run("session", "cp", "main:data", "other:/root/s3/again"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if have := tree(t, filepath.Join(f.files, "again")); have != want {
		t.Errorf("copied between sessions:\n%s\nwant:\n%s", have, want)
	}
}

// Where things land is as with cp -r and docker cp.
func TestCopyNames(t *testing.T) {
	f, project := withFiles(t)
	write := func(path string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("x"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		src, dst string
		lands    string // relative to the test's folder or to the project; empty: refused
		says     string
	}{
		// Out of the session.
		{"main:file", ".", "here/file", ""},
		{"main:file", "new", "here/new", ""},
		{"main:file", "there", "here/there/file", ""},
		{"main:file", "there/", "here/there/file", ""},
		{"main:file", "missing/", "", "there is no folder missing/"},
		{"main:file", "missing/new", "", "no such file"},
		{"main:dir", "new", "here/new/in", ""},
		{"main:dir", "there", "here/there/dir/in", ""},
		{"main:dir/", "there", "here/there/dir/in", ""},
		{"main:dir/.", "there", "here/there/in", ""},
		{"main:/root/s3/workspace/project/dir/.", "deep/er", "here/deep/er/in", ""},
		{"main:.", "all", "here/all/dir/in", ""},
		{"main:", "all", "here/all/dir/in", ""},
		{"main:/root/s3", "all", "here/all/workspace/project/dir/in", ""},
		{"main:dir", "old", "", "old is a file"},
		{"main:file/.", "there", "", "is no folder"},
		{"main:nothing", "new", "", "there is no /root/s3/workspace/project/nothing"},
		{"nobody:file", "new", "", "no session nobody"},
		{"main:/etc/passwd", "new", "", "only what is below /root/s3"},
		{"main:../../../../etc", "new", "", "only what is below /root/s3"},
		{"main:link", "new", "here/new", ""},
		// Into it.
		{"old", "main:", "project/old", ""},
		{"old", "main:new", "project/new", ""},
		{"old", "main:dir", "project/dir/old", ""},
		{"old", "main:missing/", "project/missing/old", ""},
		{"old", "main:missing/new", "project/missing/new", ""},
		{"old", "main:/root/s3/top", "s3/top", ""},
		{"there", "main:new", "project/new/kept", ""},
		{"there", "main:dir", "project/dir/there/kept", ""},
		{"there/", "main:dir", "project/dir/there/kept", ""},
		{"there/.", "main:dir", "project/dir/kept", ""},
		{"there", "main:/root/s3", "s3/there/kept", ""},
		{"there", "main:file", "", "is a file"},
		{"old/", "main:new", "", "old/ is no folder"},
		{"gone", "main:new", "", "no such file"},
		{"old", "nobody:new", "", "no session nobody"},
		{"./with:colon", "main:new", "project/new", ""},
		// Between two.
		{"main:dir", "main:file2", "project/file2/in", ""},
		{"main:file", "main:dir", "project/dir/file", ""},
		{"main:dir/.", "main:/root/s3/x", "s3/x/in", ""},
		// Neither.
		{"old", "new", "", "must be in a session"},
		{"-", "new", "", "must be in a session"},
	} {
		t.Run(tc.src+" "+tc.dst, func(t *testing.T) {
			here := t.TempDir()
			t.Chdir(here)
			for _, dir := range []string{f.files} {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			write(filepath.Join(project, "file"))
			write(filepath.Join(project, "dir", "in"))
			if err := os.Symlink("file", filepath.Join(project, "link")); err != nil {
				t.Fatal(err)
			}
			write("old")
			write("there/kept")
			write("with:colon")
			r := f.runWith(invocation{stdin: strings.NewReader("")}, "session", "cp", tc.src, tc.dst)
			if tc.lands == "" {
				if r.code == 0 || !strings.Contains(r.err, tc.says) {
					t.Errorf("%+v", r)
				}
				return
			}
			where, rest, _ := strings.Cut(tc.lands, "/")
			root := map[string]string{"here": here, "project": project, "s3": f.files}[where]
			info, err := os.Lstat(filepath.Join(root, rest))
			if r.code != 0 || err != nil || info.IsDir() {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

func TestCopyStreams(t *testing.T) {
	f, project := withFiles(t)
	grow(t, filepath.Join(project, "src"))
	r := f.run("session", "cp", "main:src", "-", "--at", "2026")
	if r.code != 0 || f.reads[len(f.reads)-1].GetCheckpoint() != "2026" {
		t.Fatalf("%d %s", r.code, r.err)
	}
	names, err := tarNames(strings.NewReader(r.out))
	if err != nil || !strings.Contains(names, "src/run.sh\n") {
		t.Errorf("%v %s", err, names)
	}
	if r := f.runWith(invocation{stdin: strings.NewReader(r.out)}, "session", "cp", "-", "main:in/here"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if have, want := tree(t, filepath.Join(project, "in/here/src")), tree(t, filepath.Join(project, "src")); have != want {
		t.Errorf("%s\nwant\n%s", have, want)
	}
	if r := f.runWith(invocation{out: &terminalOut{}}, "session", "cp", "main:src", "-"); r.code != exitUsage || !strings.Contains(r.err, "not for terminals") {
		t.Errorf("%+v", r)
	}
	if r := f.runWith(invocation{stdin: terminal{Reader: strings.NewReader("")}}, "session", "cp", "-", "main:x"); r.code != exitUsage || !strings.Contains(r.err, "no archive on stdin") {
		t.Errorf("%+v", r)
	}
	if r := f.runWith(invocation{stdin: strings.NewReader("this is no archive at all")}, "session", "cp", "-", "main:x"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "cp", "x", "main:x", "--at", "2026"); r.code != exitUsage || !strings.Contains(r.err, "--at") {
		t.Errorf("%+v", r)
	}
	// What is no file is left out, and said so.
	here := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(here, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := f.run("session", "cp", here, "main:pipes"); r.code != 0 || !strings.Contains(r.err, "left out "+filepath.Join(here, "pipe")) {
		t.Errorf("%+v", r)
	}
	// On a terminal there is a bar.
	out := &terminalOut{}
	if r := f.runWith(invocation{errOut: out}, "session", "cp", "main:src", filepath.Join(here, "out")); r.code != 0 || !strings.Contains(out.String(), " of 3.1 MiB") || !strings.HasSuffix(out.String(), "\x1b[K") {
		t.Errorf("%+v, %q", r, out.String())
	}
	r = f.run("session", "cp", "main:src/run.sh", filepath.Join(here, "r"), "-o", "json")
	if r.out != "{\n  \"files\": \"1\",\n  \"bytes\": \"10\"\n}\n" {
		t.Errorf("%+v", r)
	}
}

func tarNames(r io.Reader) (string, error) {
	var out strings.Builder
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out.String(), nil
		}
		if err != nil {
			return out.String(), err
		}
		out.WriteString(h.Name + "\n")
	}
}

// evilTar is an archive as only an attacker makes one.
func evilTar(t *testing.T, entries ...*tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range entries {
		if h.Typeflag == tar.TypeReg {
			h.Size = 5
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write([]byte("owned")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// A session is not trusted: whatever its archive says, nothing outside of the
// destination is touched (as in CVE-2018-1002100, CVE-2019-1002101 and
// CVE-2019-11246 of kubectl cp).
func TestCopyDoesNotEscape(t *testing.T) {
	dir := func(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeDir, Name: name} }
	file := func(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: name} }
	link := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	hard := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
	}
	f := newFleet(t)
	f.put(stored("main"))
	for name, entries := range map[string][]*tar.Header{
		"dots":                      {dir("x"), file("x/../../victim/file")},
		"dots at the front":         {dir("x"), file("../victim/file")},
		"absolute":                  {dir("x"), file("VICTIM/file")},
		"through a link":            {dir("x"), link("x/l", "VICTIM"), file("x/l/file")},
		"through a relative link":   {dir("x"), link("x/l", "../../victim"), file("x/l/file")},
		"through a link to a link":  {dir("x"), link("x/a", "x/b"), link("x/b", "VICTIM"), file("x/b/file")},
		"through a linked folder":   {dir("x"), dir("x/d"), link("x/d/l", ".."), link("x/d/l/up", "../../victim"), file("x/d/l/up/file")},
		"onto a link":               {dir("x"), link("x/l", "VICTIM/file"), file("x/l"), file("x/ok")},
		"folder onto a link":        {dir("x"), link("x/l", "VICTIM"), dir("x/l"), file("x/l/file")},
		"mode of a linked folder":   {dir("x"), dir("x/d"), link("x/d", "VICTIM")},
		"hard link out":             {dir("x"), hard("x/h", "../victim/file"), file("x/h")},
		"hard link out, absolute":   {dir("x"), hard("x/h", "VICTIM/file"), file("x/h")},
		"hard link through a link":  {dir("x"), link("x/l", "VICTIM"), hard("x/h", "x/l/file")},
		"the top is a link":         {link("x", "VICTIM"), file("x/file")},
		"the top is a link, folder": {link("x", "VICTIM"), dir("x"), file("x/file")},
		"a file that has children":  {file("x"), file("x/file")},
		"another top":               {dir("x"), file("victim/file"), file("y")},
		"a nul":                     {dir("x"), {Typeflag: tar.TypeReg, Name: "x/\x01file"}},
	} {
		for _, dst := range []string{"there", "new", "there/"} {
			t.Run(name+" to "+dst, func(t *testing.T) {
				here := t.TempDir()
				t.Chdir(here)
				victim := filepath.Join(here, "victim")
				if err := errors.Join(os.MkdirAll(victim, 0o700), os.WriteFile(filepath.Join(victim, "file"), []byte("precious"), 0o600), os.Mkdir("there", 0o755)); err != nil {
					t.Fatal(err)
				}
				before := tree(t, victim)
				var mine []*tar.Header
				for _, h := range entries {
					h := *h
					h.Name = strings.Replace(h.Name, "VICTIM", victim, 1)
					h.Linkname = strings.Replace(h.Linkname, "VICTIM", victim, 1)
					mine = append(mine, &h)
				}
				archive := evilTar(t, mine...)
				f.onRead = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error { return sendArchive(s, archive) }
				r := f.run("session", "cp", "main:x", dst)
				if after := tree(t, victim); after != before {
					t.Errorf("%+v\nbefore:\n%safter:\n%s", r, before, after)
				}
				all, err := os.ReadDir(here)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range all {
					switch e.Name() {
					case "victim", "there", "new":
					default:
						t.Errorf("%s was made (exit %d, %s)", e.Name(), r.code, r.err)
					}
				}
			})
		}
	}
}

// What is set on a file of a session must not give anyone here another user's rights.
func TestCopyDropsSetuid(t *testing.T) {
	f := newFleet(t)
	f.put(stored("main"))
	archive := evilTar(t, &tar.Header{Typeflag: tar.TypeDir, Name: "x", Mode: 0o7777}, &tar.Header{Typeflag: tar.TypeReg, Name: "x/su", Mode: 0o6755, Uid: 12345},
		&tar.Header{Typeflag: tar.TypeChar, Name: "x/mem", Devmajor: 1, Devminor: 1}, &tar.Header{Typeflag: tar.TypeFifo, Name: "x/pipe"})
	f.onRead = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error { return sendArchive(s, archive) }
	t.Chdir(t.TempDir())
	r := f.run("session", "cp", "main:x", ".")
	if r.code != 0 || r.err != "  left out mem: it is no file, folder or link\n  left out pipe: it is no file, folder or link\n" {
		t.Errorf("%+v", r)
	}
	info, err := os.Stat("x/su")
	if err != nil || info.Mode() != 0o755 || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()) {
		t.Errorf("%v %v", info, err)
	}
}

// hanging sends an archive's first half, and then nothing until the client goes.
func hanging(archive []byte, sent chan<- struct{}) func(*cloudcodev1.ReadArchiveRequest, archiveOut) error {
	return func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
		if err := sendArchive(s, archive[:len(archive)/2]); err != nil {
			return err
		}
		close(sent)
		<-s.Context().Done()
		return s.Context().Err()
	}
}

// Ctrl-C, or a connection that breaks, leaves no half file.
func TestNoHalfFiles(t *testing.T) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	content := bytes.Repeat([]byte("x"), 4<<20)
	if err := tw.WriteHeader(&tar.Header{Name: "big", Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	archive := buf.Bytes()
	for what, args := range map[string][]string{
		"cp":            {"session", "cp", "main:big", "new"},
		"cp over":       {"session", "cp", "main:big", "old"},
		"export":        {"session", "export", "main", "-f", "new"},
		"export over":   {"session", "export", "main", "-f", "old"},
		"cp into":       {"session", "cp", "main:big", "."},
		"export folder": {"session", "export", "main", "-f", "./new"},
	} {
		t.Run(what, func(t *testing.T) {
			f := newFleet(t)
			f.put(stored("main"))
			here := t.TempDir()
			t.Chdir(here)
			if err := os.WriteFile("old", []byte("old"), 0o644); err != nil {
				t.Fatal(err)
			}
			clean := func(r result) {
				t.Helper()
				all, _ := os.ReadDir(here)
				if data, err := os.ReadFile("old"); len(all) != 1 || string(data) != "old" {
					t.Errorf("%+v left %v, %v", r, all, err)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			sent := make(chan struct{})
			f.onRead = hanging(archive, sent)
			done := make(chan struct{})
			go func() { defer close(done); <-sent; cancel() }()
			r := f.runWith(invocation{ctx: ctx}, args...)
			<-done
			if r.code != exitInterrupted {
				t.Errorf("%+v", r)
			}
			clean(r)
			f.onRead = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
				if err := sendArchive(s, archive[:len(archive)/2]); err != nil {
					return err
				}
				return grpcerr.New(codes.Unavailable, "NODE_UNREACHABLE", "the node has gone")
			}
			if r = f.run(args...); r.code != exitUnavailable || !strings.Contains(r.err, "the node has gone") {
				t.Errorf("%+v", r)
			}
			clean(r)
			// A server that takes a part for the whole.
			if strings.HasPrefix(what, "cp") {
				f.onRead = func(_ *cloudcodev1.ReadArchiveRequest, s archiveOut) error {
					return sendArchive(s, archive[:len(archive)/2])
				}
				if r = f.run(args...); r.code == 0 {
					t.Errorf("%+v", r)
				}
				clean(r)
			}
		})
	}
}

func TestExport(t *testing.T) {
	f, project := withFiles(t)
	grow(t, filepath.Join(project, "src"))
	t.Chdir(t.TempDir())
	r := f.run("session", "export", "main", "-f", "main.tar", "--at", "2026")
	if r.code != 0 || !strings.HasPrefix(r.out, "session main exported to main.tar, ") || r.err != "" {
		t.Fatalf("%+v", r)
	}
	if have := f.reads[0]; have.GetPath() != "" || have.GetCheckpoint() != "2026" {
		t.Errorf("asked %v", have)
	}
	info, err := os.Stat("main.tar")
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	out, err := exec.Command("tar", "tf", "main.tar").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "./workspace/project/src/run.sh\n") {
		t.Errorf("%v %s", err, out)
	}
	stdout := f.run("session", "export", "main")
	if whole, _ := os.ReadFile("main.tar"); stdout.code != 0 || stdout.err != "" || len(stdout.out) != len(whole) {
		t.Errorf("%d bytes on stdout, %d in the file, %s", len(stdout.out), len(whole), stdout.err)
	}
	if r := f.runWith(invocation{out: &terminalOut{}}, "session", "export", "main"); r.code != exitUsage || !strings.Contains(r.err, "not for terminals") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "export", "nobody", "-f", "x.tar"); r.code != exitNotFound {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "export", "main", "-f", "."); r.code != exitUsage || !strings.Contains(r.err, "is a folder") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "export", "main", "-f", "no/such/folder/x.tar"); r.code != exitUsage || !strings.Contains(r.err, "no such file") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "export", "main", "-f", "/dev/null"); r.code != 0 {
		t.Errorf("%+v", r)
	}
	if info, err := os.Stat("/dev/null"); err != nil || info.Mode()&fs.ModeDevice == 0 {
		t.Fatalf("/dev/null was replaced: %v", err)
	}
	term := &terminalOut{}
	if r := f.runWith(invocation{errOut: term}, "session", "export", "main", "-f", "again.tar"); r.code != 0 || !strings.Contains(term.String(), "exporting main") {
		t.Errorf("%+v, %q", r, term.String())
	}
	if all, _ := os.ReadDir("."); len(all) != 2 {
		t.Errorf("left: %v", all)
	}
}

func TestImport(t *testing.T) {
	f, project := withFiles(t)
	grow(t, filepath.Join(project, "src"))
	want := tree(t, f.files)
	here := t.TempDir()
	t.Chdir(here)
	if r := f.run("session", "export", "main", "-f", "main.tar"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	whole, err := os.ReadFile("main.tar")
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(whole); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("main.tgz", packed.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	f.onCreate = func(req *cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
		s := stored(req.GetSessionId())
		f.put(s)
		s.State = cloudcodev1.Session_STARTING // it runs a moment later
		return s, nil
	}
	for what, i := range map[string]struct {
		stdin io.Reader
		args  []string
	}{
		"file":        {nil, []string{"-f", "main.tar", "--wait"}},
		"gzip":        {nil, []string{"-f", "main.tgz"}},
		"stdin":       {bytes.NewReader(whole), nil},
		"gzip, stdin": {bytes.NewReader(packed.Bytes()), []string{"-f", "-"}},
	} {
		f.files = filepath.Join(t.TempDir(), "s3")
		f.creates = nil
		f.remove("sessions/copy")
		r := f.runWith(invocation{stdin: i.stdin}, append([]string{"session", "import", "copy"}, i.args...)...)
		if r.code != 0 || !strings.HasPrefix(r.out, "session copy: imported ") || !strings.Contains(r.err, "session copy created\n") {
			t.Fatalf("%s: %+v", what, r)
		}
		if have := tree(t, f.files); have != want {
			t.Errorf("%s:\n%s\nwant\n%s", what, have, want)
		}
		if len(f.creates) != 1 || f.creates[0].GetSessionId() != "copy" {
			t.Errorf("%s: created %v", what, f.creates)
		}
	}

	// Nothing is created for what cannot be imported.
	f.creates = nil
	if err := os.WriteFile("text", bytes.Repeat([]byte("no archive\n"), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("nothing", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for file, says := range map[string]string{"text": "is no tar archive", "nothing": "is no tar archive", ".": "session cp", "missing": "no such file"} {
		if r := f.run("session", "import", "fresh", "-f", file); r.code != exitUsage || !strings.Contains(r.err, says) || len(f.creates) != 0 {
			t.Errorf("%s: %+v", file, r)
		}
	}
	// A session that sleeps is not woken.
	f.put(moved(stored("asleep"), 0, cloudcodev1.Session_SUSPENDED, nil))
	if r := f.run("session", "import", "asleep", "-f", "main.tar"); r.code != exitFailed || !strings.Contains(r.err, "cloudcode session resume asleep") {
		t.Errorf("%+v", r)
	}
	// An archive that breaks off is not taken for all by the server.
	if err := os.WriteFile("half.tgz", packed.Bytes()[:packed.Len()/2], 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	f.onWrite = func(s archiveIn) error {
		_, _, err := takeArchive(s)
		ended <- err
		return err
	}
	r := f.run("session", "import", "main", "-f", "half.tgz")
	if err := <-ended; err == nil || r.code == 0 || !strings.Contains(r.err, "breaks off") {
		t.Errorf("%+v, the server saw %v", r, err)
	}
	// What the server says comes through, in the middle of it all, too.
	f.onWrite = func(s archiveIn) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		return grpcerr.New(codes.ResourceExhausted, "NODE_DISK_FULL", "the disk of n1 is full")
	}
	if r := f.run("session", "import", "main", "-f", "main.tar"); r.code != exitError || !strings.Contains(r.err, "the disk of n1 is full") {
		t.Errorf("%+v", r)
	}
}

// A local file that changes under the copy is not made up for.
func TestCopySourceShrinks(t *testing.T) {
	f, _ := withFiles(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), bytes.Repeat([]byte("x"), 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	f.onWrite = func(s archiveIn) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		// The client is at most a few buffers ahead of what is read here.
		if err := os.Truncate(filepath.Join(dir, "a"), 1<<10); err != nil {
			return err
		}
		_, _, err := takeArchive(s)
		ended <- err
		return err
	}
	r := f.run("session", "cp", dir, "main:")
	if err := <-ended; err == nil || r.code == 0 || !strings.Contains(r.err, "became shorter") {
		t.Errorf("%+v, the server saw %v", r, err)
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add([]byte{})
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "x/", Mode: 0o755},
		{Typeflag: tar.TypeSymlink, Name: "x/l", Linkname: "../.."},
		{Typeflag: tar.TypeReg, Name: "x/l/f", Mode: 0o644},
		{Typeflag: tar.TypeLink, Name: "x/h", Linkname: "x/l/f"},
	} {
		if err := tw.WriteHeader(h); err != nil {
			f.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, archive []byte) {
		outer := t.TempDir()
		inner := filepath.Join(outer, "in")
		if err := os.Mkdir(inner, 0o755); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(inner)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		u := &unpacker{root: root, rename: func(name string) (string, bool) { return name, true }}
		_ = u.unpack(bytes.NewReader(archive)) // it may fail, not escape
		all, err := os.ReadDir(outer)
		if err != nil || len(all) != 1 {
			t.Errorf("%v %v", all, err)
		}
	})
}
