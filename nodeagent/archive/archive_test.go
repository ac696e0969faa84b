package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const idBase = 0x10000000

func newTree(t *testing.T) (Tree, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("other owners need root")
		}
		t.Skip("other owners need root")
	}
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return Tree{Root: root, IDBase: idBase}, dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPath(t *testing.T) {
	for in, want := range map[string]string{
		"": ".", "/root/s3": ".", "/root/s3/": ".", "/root/s3/workspace/a": "workspace/a", "a/b": "workspace/project/a/b",
		".": "workspace/project", "../x": "workspace/x", "/root/s3/../s3/y": "y", "../../../s3/z": "z",
	} {
		if got, err := Path(in); got != want || err != nil {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"/", "/etc/passwd", "/root/s3x", "/root/s3/../x", "../../../../etc", "a\x00b"} {
		if got, err := Path(in); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	from, dir := newTree(t)
	old := time.Unix(1700000000, 0)
	p := func(rel string) string { return filepath.Join(dir, rel) }
	must(t, os.MkdirAll(p("work/sub"), 0o750))
	must(t, os.WriteFile(p("work/tool"), []byte("#!/bin/sh\n"), 0o755))
	must(t, os.Chmod(p("work/tool"), os.ModeSetuid|0o755))
	must(t, os.Link(p("work/tool"), p("work/twin")))
	must(t, os.Symlink("/etc/passwd", p("work/away")))
	must(t, os.WriteFile(p("work/sub/odd \n\xff name"), []byte("x"), 0o600))
	must(t, unix.Mkfifo(p("work/pipe"), 0o600))
	must(t, filepath.WalkDir(p("work"), func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, idBase+7, idBase+8))
	}))
	must(t, os.Chmod(p("work/tool"), os.ModeSetuid|0o755)) // chown has cleared it
	must(t, os.Chtimes(p("work/tool"), old, old))
	must(t, os.Chtimes(p("work/sub"), old, old))

	var buf bytes.Buffer
	must(t, from.Write(t.Context(), "work", &buf))
	size, err := from.Size(t.Context(), "work")
	if err != nil || size < int64(buf.Len())/4 || size > int64(buf.Len())*4 {
		t.Errorf("size said %d, %v; it is %d", size, err, buf.Len())
	}
	to, toDir := newTree(t)
	files, n, err := to.Extract(t.Context(), "new/place", &buf)
	if err != nil || files != 5 || n != int64(len("#!/bin/sh\n")+1) {
		t.Fatalf("%d files, %d bytes, %v", files, n, err)
	}
	q := func(rel string) string { return filepath.Join(toDir, "new/place/work", rel) }
	var a, b unix.Stat_t
	must(t, unix.Stat(q("tool"), &a))
	must(t, unix.Stat(q("twin"), &b))
	if a.Ino != b.Ino || a.Uid != idBase+7 || a.Gid != idBase+8 || a.Mode&0o7777 != 0o4755 || a.Mtim.Sec != old.Unix() {
		t.Errorf("tool is %+v, twin %+v", a, b)
	}
	must(t, unix.Stat(q("sub"), &a))
	if a.Mode&0o7777 != 0o750 || a.Mtim.Sec != old.Unix() {
		t.Errorf("sub is %o of %d", a.Mode, a.Mtim.Sec)
	}
	must(t, unix.Stat(filepath.Join(toDir, "new"), &a))
	if a.Uid != idBase {
		t.Errorf("the folder that was made belongs to %d", a.Uid)
	}
	must(t, unix.Lstat(q("pipe"), &a))
	if a.Mode&unix.S_IFMT != unix.S_IFIFO || a.Uid != idBase+7 {
		t.Errorf("pipe is %o of %d", a.Mode, a.Uid)
	}
	if target, err := os.Readlink(q("away")); target != "/etc/passwd" {
		t.Errorf("link is %q, %v", target, err)
	}
	if data, err := os.ReadFile(q("sub/odd \n\xff name")); string(data) != "x" {
		t.Errorf("odd name: %q, %v", data, err)
	}
}

func TestReadingIsCareful(t *testing.T) {
	from, dir := newTree(t)
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("1"), 0o644))
	must(t, os.Mkdir(filepath.Join(dir, "cache"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "cache/c"), nil, 0o644))
	must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600)) // would block who opens it
	must(t, os.Symlink("/etc", filepath.Join(dir, "out")))
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	defer unix.Close(l)
	must(t, unix.Bind(l, &unix.SockaddrUnix{Name: filepath.Join(dir, "socket")}))
	from.Skip = func(rel string, _ bool) bool { return rel == "cache" }
	var buf bytes.Buffer
	must(t, from.Write(t.Context(), ".", &buf))
	var names []string
	for r := tar.NewReader(&buf); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		names = append(names, h.Name)
	}
	if want := []string{"file", "out", "pipe"}; !slices.Equal(names, want) {
		t.Errorf("archive has %q, want %q", names, want)
	}
	for _, rel := range []string{"none", "file/x"} {
		if err := from.Write(t.Context(), rel, io.Discard); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", rel, err)
		}
	}
	if err := from.Write(t.Context(), "out/passwd", io.Discard); err == nil {
		t.Error("a link led out of the tree")
	}
}

func TestNothingLandsOutside(t *testing.T) {
	for name, entries := range map[string][]tar.Header{
		"dots":                     {{Name: "../evil", Typeflag: tar.TypeReg}},
		"dots within":              {{Name: "a/../../evil", Typeflag: tar.TypeReg}},
		"absolute":                 {{Name: "/evil", Typeflag: tar.TypeReg}},
		"through a link":           {{Name: "l", Linkname: "..", Typeflag: tar.TypeSymlink}, {Name: "l/evil", Typeflag: tar.TypeReg}},
		"through an absolute link": {{Name: "l", Linkname: "/", Typeflag: tar.TypeSymlink}, {Name: "l/evil", Typeflag: tar.TypeReg}},
		"hard link out":            {{Name: "h", Linkname: "../secret", Typeflag: tar.TypeLink}},
		"device":                   {{Name: "d", Typeflag: tar.TypeBlock}},
	} {
		t.Run(name, func(t *testing.T) {
			to, dir := newTree(t)
			must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("s"), 0o600))
			var buf bytes.Buffer
			w := tar.NewWriter(&buf)
			for _, h := range entries {
				must(t, w.WriteHeader(&h))
			}
			must(t, w.Close())
			_, _, err := to.Extract(t.Context(), "sub", &buf)
			if err == nil {
				t.Error("taken")
			}
			for _, p := range []string{filepath.Join(dir, "evil"), "/evil"} {
				if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is there: %v", p, err)
				}
			}
		})
	}
}

func TestCopy(t *testing.T) {
	from, dir := newTree(t)
	to, toDir := newTree(t)
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "a/b/c"), []byte("x"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "a/other"), nil, 0o644))
	must(t, Copy(t.Context(), from, to, "a/b"))
	if data, err := os.ReadFile(filepath.Join(toDir, "a/b/c")); string(data) != "x" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := os.Lstat(filepath.Join(toDir, "a/other")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("more was copied than asked for")
	}
	if err := Copy(t.Context(), from, to, "none"); !errors.Is(err, ErrNotFound) {
		t.Errorf("nothing there: %v", err)
	}
}

func TestExtractReplaces(t *testing.T) {
	to, dir := newTree(t)
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("untouched"), 0o644))
	must(t, os.Symlink(outside, filepath.Join(dir, "f")))
	must(t, os.MkdirAll(filepath.Join(dir, "full/of"), 0o755))
	archive := func(name, data string) io.Reader {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		must(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data)), Uid: 1 << 20}))
		_, err := w.Write([]byte(data))
		must(t, errors.Join(err, w.Close()))
		return &buf
	}
	for range 2 {
		_, _, err := to.Extract(t.Context(), ".", archive("f", "new"))
		must(t, err)
	}
	if data, _ := os.ReadFile(outside); string(data) != "untouched" {
		t.Errorf("written through a link: %q", data)
	}
	fi, err := os.Lstat(filepath.Join(dir, "f"))
	if err != nil || !fi.Mode().IsRegular() || fi.Sys().(*unixStat).Uid != idBase {
		t.Errorf("f is %v, %v", fi, err)
	}
	if _, _, err := to.Extract(t.Context(), ".", archive("full", "x")); !errors.Is(err, ErrInvalid) {
		t.Errorf("a file over a full folder: %v", err)
	}
	for _, bad := range []string{"no archive at all, but long enough to be a header" + strings.Repeat(" ", 1024)} {
		if _, _, err := to.Extract(t.Context(), ".", strings.NewReader(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("no archive: %v", err)
		}
	}
	whole, err := io.ReadAll(archive("g", strings.Repeat("y", 4096)))
	must(t, err)
	if _, _, err := to.Extract(t.Context(), ".", bytes.NewReader(whole[:2000])); !errors.Is(err, ErrInvalid) {
		t.Errorf("an archive that ends too early: %v", err)
	}
}
