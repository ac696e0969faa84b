package image

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// layerCompression is about level 3 of the zstd program. Measured on the whole image, with import and
// unpacking: zstd 184 MB and 6-7 s, gzip 200 MB and 8-10 s, plain 592 MB and 7-10 s. containerd and
// Docker 23 and later read it.
const layerCompression = zstd.SpeedDefault

// sourceDate is the one time stamp in an image: nothing in it is younger. It goes up with the
// pinned versions, because Debian's compiled Python files are only valid while their sources keep
// their own, older times.
var sourceDate = time.Date(2026, time.November, 20, 0, 0, 0, 0, time.UTC)

// layer is a compressed layer in the cache, with the figures that a manifest needs.
type layer struct {
	Name        string  `json:"name"`
	Key         string  `json:"key"`
	LayerDigest v1.Hash `json:"digest"` // of the compressed bytes
	LayerDiffID v1.Hash `json:"diffID"` // of the tar
	LayerSize   int64   `json:"size"`   // compressed, bytes
	Unpacked    int64   `json:"unpacked"`
	path        string
	cached      bool
	took        time.Duration
}

var _ v1.Layer = (*layer)(nil)

func (l *layer) Digest() (v1.Hash, error)            { return l.LayerDigest, nil }
func (l *layer) DiffID() (v1.Hash, error)            { return l.LayerDiffID, nil }
func (l *layer) Size() (int64, error)                { return l.LayerSize, nil }
func (l *layer) MediaType() (types.MediaType, error) { return types.OCILayerZStd, nil }
func (l *layer) Compressed() (io.ReadCloser, error)  { return os.Open(l.path) }
func (l *layer) Uncompressed() (io.ReadCloser, error) {
	f, err := os.Open(l.path)
	if err != nil {
		return nil, err
	}
	d, err := zstd.NewReader(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{d, closer(func() error { d.Close(); return f.Close() })}, nil
}

type closer func() error

func (c closer) Close() error { return c() }

// countingHash hashes and counts what is written to it.
type countingHash struct {
	hash.Hash
	n int64
}

func newCountingHash() *countingHash { return &countingHash{Hash: sha256.New()} }

func (c *countingHash) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.Hash.Write(p)
}

func (c *countingHash) digest() v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(c.Sum(nil))}
}

// writeLayer runs fill on a tar writer and stores what it wrote, compressed, at dst. The bytes
// depend on what fill writes only: zstd's level and library are pinned by the code and go.mod.
func writeLayer(dst string, fill func(*tar.Writer) error) (_ *layer, err error) {
	f, err := os.Create(dst)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	packed, plain := newCountingHash(), newCountingHash()
	z, err := zstd.NewWriter(io.MultiWriter(f, packed), zstd.WithEncoderLevel(layerCompression))
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(io.MultiWriter(z, plain))
	if err := fill(tw); err != nil {
		return nil, errors.Join(err, z.Close())
	}
	if err := errors.Join(tw.Close(), z.Close()); err != nil {
		return nil, err
	}
	return &layer{
		LayerDigest: packed.digest(), LayerDiffID: plain.digest(),
		LayerSize: packed.n, Unpacked: plain.n, path: dst,
	}, nil
}

// normalise strips from a header what differs from build to build: owner names, sub-second and
// access times, times after sourceDate, and every extended record but file attributes.
func normalise(h *tar.Header) {
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.ModTime = h.ModTime.Truncate(time.Second)
	if h.ModTime.After(sourceDate) || h.ModTime.IsZero() {
		h.ModTime = sourceDate
	}
	h.Format = tar.FormatUnknown
	for k := range h.PAXRecords {
		if !strings.HasPrefix(k, "SCHILY.xattr.") {
			delete(h.PAXRecords, k)
		}
	}
}

// tree collects files for a layer and writes them sorted, with their parent folders, all owned by
// root and dated sourceDate.
type tree struct {
	entries map[string]treeEntry
}

type treeEntry struct {
	header tar.Header
	open   func() (io.ReadCloser, error)
}

func (t *tree) add(name string, h tar.Header, open func() (io.ReadCloser, error)) {
	if t.entries == nil {
		t.entries = make(map[string]treeEntry)
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	h.Name = name
	t.entries[name] = treeEntry{h, open}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := t.entries[dir]; !ok {
			t.entries[dir] = treeEntry{header: tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: dirMode(dir)}}
		}
	}
}

// dirMode keeps the base's modes: a layer that names a folder again sets its mode again.
func dirMode(dir string) int64 {
	if dir == "root" {
		return 0o700
	}
	return 0o755
}

func (t *tree) dir(name string) {
	t.add(name, tar.Header{Typeflag: tar.TypeDir, Mode: dirMode(name)}, nil)
}

func (t *tree) symlink(name, target string) {
	t.add(name, tar.Header{Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, nil)
}

func (t *tree) bytes(name string, mode int64, data []byte) {
	t.add(name, tar.Header{Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(data))}, func() (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(string(data))), nil
	})
}

// file adds a file of this machine. Its mode becomes 0755 or 0644.
func (t *tree) file(name, src string) error {
	info, err := os.Stat(src)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", src)
	}
	mode := int64(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	t.add(name, tar.Header{Typeflag: tar.TypeReg, Mode: mode, Size: info.Size()}, func() (io.ReadCloser, error) {
		return os.Open(src)
	})
	return nil
}

// dirTree adds everything below src, except what skip names (by path relative to src).
func (t *tree) dirTree(name, src string, skip func(rel string, d fs.DirEntry) bool) error {
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		if rel != "." && skip != nil && skip(rel, d) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		to := path.Join(name, filepath.ToSlash(rel))
		switch {
		case d.IsDir():
			t.dir(to)
			return nil
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			t.symlink(to, target)
			return nil
		default:
			return t.file(to, p)
		}
	})
}

// fsTree adds everything below an embedded folder; its files are not executable.
func (t *tree) fsTree(name string, src fs.FS) error {
	return fs.WalkDir(src, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := path.Join(name, p)
		if d.IsDir() {
			t.dir(to)
			return nil
		}
		data, err := fs.ReadFile(src, p)
		if err != nil {
			return err
		}
		t.bytes(to, 0o644, data)
		return nil
	})
}

func (t *tree) writeTo(tw *tar.Writer) error {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		e := t.entries[name]
		h := e.header
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		normalise(&h)
		if err := writeEntry(tw, &h, e.open); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func writeEntry(tw *tar.Writer, h *tar.Header, open func() (io.ReadCloser, error)) error {
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	if open == nil {
		return nil
	}
	r, err := open()
	if err != nil {
		return err
	}
	_, err = io.Copy(tw, r)
	return errors.Join(err, r.Close())
}

// cacheKey hashes everything that decides what a layer holds. Callers put the source of the code
// that makes the layer in, so that a change there is never served from an old cache.
func cacheKey(parts ...any) string {
	h := sha256.New()
	enc := json.NewEncoder(h)
	for _, p := range parts {
		if err := enc.Encode(p); err != nil {
			panic(err) // strings, numbers and structs of them
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:32]
}
