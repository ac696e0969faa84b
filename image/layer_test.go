package image

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
)

func readTar(t *testing.T, r io.Reader) (headers []*tar.Header, contents map[string]string) {
	t.Helper()
	contents = make(map[string]string)
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return headers, contents
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
		contents[h.Name] = string(data)
	}
}

// TestTreeIsDeterministic: order of adding, times and owners on disk leave no trace.
func TestTreeIsDeterministic(t *testing.T) {
	build := func(mtime time.Time, reverse bool) (*layer, []byte) {
		dir := t.TempDir()
		names := []string{"b/two", "a", "b/one", "skipped"}
		if reverse {
			slices.Reverse(names)
		}
		for _, name := range names {
			p := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, []byte(name), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(p, mtime, mtime); err != nil {
				t.Fatal(err)
			}
		}
		var tr tree
		if reverse {
			tr.symlink("/usr/link", "a")
		}
		err := tr.dirTree("usr/dir", dir, func(rel string, _ fs.DirEntry) bool { return rel == "skipped" })
		if err != nil {
			t.Fatal(err)
		}
		tr.symlink("usr/link", "a")
		dst := filepath.Join(t.TempDir(), "layer")
		l, err := writeLayer(dst, func(tw *tar.Writer) error { return tr.writeTo(tw) })
		if err != nil {
			t.Fatal(err)
		}
		packed, err := os.ReadFile(dst)
		if err != nil {
			t.Fatal(err)
		}
		return l, packed
	}
	one, oneBytes := build(time.Unix(1, 0), false)
	two, twoBytes := build(time.Now(), true)
	if one.LayerDigest != two.LayerDigest || one.LayerDiffID != two.LayerDiffID || !bytes.Equal(oneBytes, twoBytes) {
		t.Fatalf("%v and %v differ", one.LayerDigest, two.LayerDigest)
	}
	if int64(len(oneBytes)) != one.LayerSize {
		t.Errorf("size %d, file has %d", one.LayerSize, len(oneBytes))
	}
	r, err := one.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	headers, contents := readTar(t, r)
	var names []string
	for _, h := range headers {
		names = append(names, h.Name)
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(sourceDate) {
			t.Errorf("%s: uid %d gid %d uname %q time %s", h.Name, h.Uid, h.Gid, h.Uname, h.ModTime)
		}
	}
	want := []string{"usr/", "usr/dir/", "usr/dir/a", "usr/dir/b/", "usr/dir/b/one", "usr/dir/b/two", "usr/link"}
	if !slices.Equal(names, want) {
		t.Errorf("names %q, want %q", names, want)
	}
	if contents["usr/dir/b/two"] != "b/two" {
		t.Errorf("contents %q", contents)
	}
}

func TestFilterBase(t *testing.T) {
	var in bytes.Buffer
	tw := tar.NewWriter(&in)
	late := sourceDate.Add(time.Hour)
	old := time.Date(2025, 1, 2, 3, 4, 5, 600, time.UTC)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./dev/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
		{Name: "./etc/hostname", Typeflag: tar.TypeReg},
		{Name: "./etc/machine-id", Typeflag: tar.TypeReg},
		{Name: "./etc/apt/sources.list", Typeflag: tar.TypeReg},
		{Name: "./usr/bin/a", Typeflag: tar.TypeReg, ModTime: old, Uname: "root", Mode: 0o4755, Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x", "comment": "y"}},
		{Name: "./usr/bin/b", Typeflag: tar.TypeLink, Linkname: "./usr/bin/a", ModTime: late},
		{Name: "./var/lib/apt/lists/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./var/lib/apt/lists/partial/", Typeflag: tar.TypeDir, Uid: 42, Mode: 0o700},
		{Name: "./var/lib/dpkg/status", Typeflag: tar.TypeReg},
		{Name: "./var/lib/dpkg/status-old", Typeflag: tar.TypeReg},
		{Name: "./var/log/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./var/log/apt/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./var/log/dpkg.log", Typeflag: tar.TypeReg},
		{Name: "./var/cache/ldconfig/aux-cache", Typeflag: tar.TypeReg},
	} {
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	tw = tar.NewWriter(&out)
	if err := filterBase(&in, tw); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	headers, _ := readTar(t, &out)
	var names []string
	for _, h := range headers {
		names = append(names, h.Name)
		switch h.Name {
		case "usr/bin/a":
			if !h.ModTime.Equal(old.Truncate(time.Second)) || h.Uname != "" || h.Mode != 0o4755 {
				t.Errorf("a: %+v", h)
			}
			if h.PAXRecords["SCHILY.xattr.security.capability"] != "x" || h.PAXRecords["comment"] != "" {
				t.Errorf("a: records %v", h.PAXRecords)
			}
		case "usr/bin/b":
			if h.Linkname != "usr/bin/a" || !h.ModTime.Equal(sourceDate) {
				t.Errorf("b: link %q time %s", h.Linkname, h.ModTime)
			}
		}
	}
	want := []string{"dev/", "etc/apt/sources.list", "usr/bin/a", "usr/bin/b", "var/lib/apt/lists/", "var/lib/dpkg/status", "var/log/", "var/log/apt/"}
	if !slices.Equal(names, want) {
		t.Errorf("names %q\nwant  %q", names, want)
	}
	if err := filterBase(strings.NewReader(""), tar.NewWriter(io.Discard)); err == nil {
		t.Error("no files, no error")
	}
}

func TestCacheKeys(t *testing.T) {
	base := baseKey(BuildOptions{})
	if base != baseKey(BuildOptions{CacheDir: "/elsewhere", Ref: "x"}) {
		t.Error("the base's key depends on what does not change it")
	}
	if base == baseKey(BuildOptions{Mirrors: []string{"http://mirror.test/debian"}}) {
		t.Error("another mirror, same key")
	}
	saved := Packages
	defer func() { Packages = saved }()
	Packages = append(slices.Clone(saved), "hello")
	if base == baseKey(BuildOptions{}) {
		t.Error("another package, same key")
	}
	if cacheKey("a", "b") == cacheKey("ab") || cacheKey([]string{"a", "b"}) == cacheKey([]string{"a"}, "b") {
		t.Error("parts run together")
	}
}
