package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// assemble puts layers and configuration together.
func assemble(layers []*layer) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	created := v1.Time{Time: sourceDate}
	cfg := &v1.ConfigFile{
		Architecture: "amd64",
		OS:           "linux",
		Created:      created,
		Config: v1.Config{
			Env:          Env(),
			Entrypoint:   Command(),
			WorkingDir:   ProjectDir,
			ExposedPorts: map[string]struct{}{fmt.Sprintf("%d/tcp", OpenCodePort): {}},
			Labels:       labels(),
			StopSignal:   "SIGTERM",
		},
		RootFS: v1.RootFS{Type: "layers"},
	}
	img, err := mutate.ConfigFile(img, cfg)
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		img, err = mutate.Append(img, mutate.Addendum{
			Layer:     l,
			History:   v1.History{Created: created, CreatedBy: "cloudcode image build: " + l.Name},
			MediaType: types.OCILayerZStd,
		})
		if err != nil {
			return nil, err
		}
	}
	return img, nil
}

// archive writes the image as an OCI layout in a tar, unless the cache has it.
func (b *builder) archive(layers []*layer) (Result, error) {
	img, err := assemble(layers)
	if err != nil {
		return Result{}, err
	}
	digest, err := img.Digest()
	if err != nil {
		return Result{}, err
	}
	res := Result{Ref: b.o.Ref, Digest: digest.String(), Path: b.cache.archivePath(digest, b.o.Ref)}
	if info, err := os.Stat(res.Path); err == nil {
		res.Size, res.Cached = info.Size(), true
		b.report(Progress{Phase: PhaseArchive, Line: res.Path + " is up to date", Done: true})
		return res, nil
	}
	b.say(PhaseArchive, "writing "+res.Path)
	f, err := os.CreateTemp(b.cache.dir, "work-archive-")
	if err != nil {
		return Result{}, err
	}
	defer os.Remove(f.Name())
	err = writeArchive(f, img, b.o.Ref)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Result{}, fmt.Errorf("write archive: %w", err)
	}
	if err := os.Rename(f.Name(), res.Path); err != nil {
		return Result{}, err
	}
	info, err := os.Stat(res.Path)
	if err != nil {
		return Result{}, err
	}
	res.Size = info.Size()
	b.report(Progress{Phase: PhaseArchive, Line: fmt.Sprintf("%s, %d MB", res.Path, res.Size/1e6), Done: true})
	return res, nil
}

// writeArchive writes an OCI image layout as a tar. containerd takes the image's name from the
// first annotation, podman and skopeo its tag from the second.
func writeArchive(w io.Writer, img v1.Image, ref string) error {
	tag := "latest"
	if i := strings.LastIndex(ref, ":"); i > strings.LastIndex(ref, "/") {
		tag = ref[i+1:]
	}
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{
		Add: img,
		Descriptor: v1.Descriptor{
			MediaType: types.OCIManifestSchema1,
			Platform:  &v1.Platform{OS: "linux", Architecture: "amd64"},
			Annotations: map[string]string{
				"io.containerd.image.name":          ref,
				"org.opencontainers.image.ref.name": tag,
			},
		},
	})
	rawIndex, err := index.RawManifest()
	if err != nil {
		return err
	}
	var t tree
	t.bytes("oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`))
	t.bytes("index.json", 0o644, rawIndex)
	addBlob := func(h v1.Hash, size int64, open func() (io.ReadCloser, error)) {
		t.add("blobs/"+h.Algorithm+"/"+h.Hex, tar.Header{Typeflag: tar.TypeReg, Mode: 0o644, Size: size}, open)
	}
	for _, get := range []struct {
		digest func() (v1.Hash, error)
		raw    func() ([]byte, error)
	}{{img.Digest, img.RawManifest}, {img.ConfigName, img.RawConfigFile}} {
		h, err := get.digest()
		if err != nil {
			return err
		}
		raw, err := get.raw()
		if err != nil {
			return err
		}
		addBlob(h, int64(len(raw)), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			return err
		}
		size, err := l.Size()
		if err != nil {
			return err
		}
		addBlob(h, size, l.Compressed)
	}
	tw := tar.NewWriter(w)
	if err := t.writeTo(tw); err != nil {
		return err
	}
	return tw.Close()
}

func (c *cache) archivePath(digest v1.Hash, ref string) string {
	// The name is inside the archive but not in the image's digest.
	return filepath.Join(c.dir, "session-"+digest.Hex[:16]+"-"+cacheKey(ref)[:8]+".tar")
}
