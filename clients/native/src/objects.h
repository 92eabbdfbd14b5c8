// Flower's objects: what a message consists of, each known by its SHA-256.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lola {

// An object that was received: "TYPE CHILD,CHILD,... LENGTH", a zero, and a body.
struct Object {
  std::string type;
  std::vector<std::string> children; // their SHA-256
  std::string body;
};

// Read an object, and check that it is the one of that SHA-256; throw Refusal otherwise.
Object read_object(const std::string& id, std::string content);

// An object to be sent, with what it consists of.
struct Tree {
  std::string id;
  std::string content;
  std::vector<Tree> children; // no two are the same
};

// Put an object together. Of children that are the same one is kept.
Tree make_tree(
    const std::string& type, const std::string& body, std::vector<Tree> children = {});

// Write names and ids as Python's json.dumps writes a dictionary.
std::string python_json(const std::vector<std::pair<std::string, std::string>>& refs);

// Read a dictionary of names and ids in JSON, in order; throw Refusal if it is none.
std::vector<std::pair<std::string, std::string>> read_refs(const std::string& json);

// Return the tree of an array that numpy.save writes as header and values.
Tree array_tree(
    const std::string& dtype_name, int64_t count, const std::string& npy_bytes);

} // namespace lola
